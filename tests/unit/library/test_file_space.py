"""The bound on the files of a library: at the border, over several servers, and which files stay."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling.features.library import tier
from starling.features.library.tier import (
    ABANDONED_SECONDS,
    COUNT_FILE,
    LATER_SECONDS,
    FileSpace,
    StoredFile,
    in_order_of_removal,
)

SIZE = 100
PAGES = f"{'0' * 16}_{'1' * 16}_r0/abc/de_g0"
"""The folder of pages whose hashes begin with abcde."""


def page(name: str) -> str:
    """The name of a page's file; ``name`` has up to four hexadecimal digits."""
    return f"{name.zfill(64)}.bin"


def write(folder: Path, name: str, age: float = 0.0, size: int = SIZE) -> Path:
    path = folder / PAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, times=(time.time() - age,) * 2)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.bin"))


def counted(folder: Path) -> int:
    return int((folder / COUNT_FILE).read_text())


def take(space: FileSpace, size: int = SIZE, name: str = page("ffff")) -> None:
    """Write a file, if there is room for it (raises OSError)."""
    with space.room_for(size):
        write(space.folder, name, size=size)


def fill(space: FileSpace, number: int) -> None:
    for index in range(number):
        with space.room_for(SIZE):
            write(space.folder, page(str(index)), age=1000 - index)


def test_all_of_the_limit_is_used_before_anything_is_removed(tmp_path: Path) -> None:
    removed: list[str] = []
    space = FileSpace(tmp_path, 10 * SIZE, removed.append)
    fill(space, 10)
    assert len(names(tmp_path)) == 10 and not removed
    assert counted(tmp_path) == 10 * SIZE
    take(space, 1)
    assert removed == [str(tmp_path / PAGES / page(str(index))) for index in (0, 1)], "down to nine tenths"
    assert counted(tmp_path) == 8 * SIZE + 1


def test_what_was_used_stays(tmp_path: Path) -> None:
    space = FileSpace(tmp_path, 10 * SIZE)
    fill(space, 10)
    now = time.time()
    space.note_used(str(tmp_path / PAGES / page("0")), now)
    space.note_used(str(tmp_path / "nowhere.bin"), now)
    take(space)
    assert names(tmp_path) == sorted([page("ffff"), *(page(str(index)) for index in (0, 3, 4, 5, 6, 7, 8, 9))])


def test_files_of_other_models_and_of_before_count(tmp_path: Path) -> None:
    write(tmp_path, page("a"), age=100, size=9 * SIZE)
    space = FileSpace(tmp_path, 10 * SIZE)
    take(space, name=page("b"))
    assert counted(tmp_path) == 10 * SIZE
    take(space, name=page("c"))
    assert names(tmp_path) == [page("b"), page("c")]


def test_files_that_were_removed_by_hand_are_no_reason_to_remove_others(tmp_path: Path) -> None:
    space = FileSpace(tmp_path, 10 * SIZE)
    fill(space, 10)
    for index in range(5):
        (tmp_path / PAGES / page(str(index))).unlink()
    take(space)
    assert len(names(tmp_path)) == 6
    assert counted(tmp_path) == 6 * SIZE


def test_what_a_killed_server_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    left = write(tmp_path, f"{page('a')}_1.tmp", age=ABANDONED_SECONDS + 1)
    written = write(tmp_path, f"{page('b')}_2.tmp", age=1)
    space = FileSpace(tmp_path, 2 * SIZE)
    with space.room_for(SIZE):
        assert not left.exists() and written.exists()
    with pytest.raises(OSError, match="all that the library's files may take is taken"):
        take(space, SIZE + 1)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model/pytorch_model.bin",
        "model/draft.tmp",
        f"model/abc/de_g0/{page('a')}",
        f"{PAGES}/pytorch_model.bin",
        f"{PAGES}/{page('a')}.tmp",
        f"{PAGES}/in/{page('a')}",
        f"{PAGES[:-6]}/{page('a')}",
    ],
)
def test_files_of_others_neither_count_nor_make_room(tmp_path: Path, name: str) -> None:
    others = tmp_path / name
    others.parent.mkdir(parents=True, exist_ok=True)
    others.write_bytes(b"x" * 50 * SIZE)
    os.utime(others, (0, 0))
    fill(FileSpace(tmp_path, 10 * SIZE), 11)
    assert others.exists()
    assert counted(tmp_path) == 9 * SIZE


def test_no_file_is_removed_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    elsewhere = write(tmp_path / "elsewhere", page("a"), age=10**6)
    (tmp_path / "library" / PAGES.partition("/")[0]).symlink_to(elsewhere.parents[2])
    with FileSpace(tmp_path / "library", SIZE).room_for(SIZE):
        assert elsewhere.exists()


def test_a_failed_write_takes_no_room(tmp_path: Path) -> None:
    space = FileSpace(tmp_path, SIZE)
    with pytest.raises(RuntimeError), space.room_for(SIZE):
        assert counted(tmp_path) == SIZE
        raise RuntimeError
    assert counted(tmp_path) == 0


def test_what_is_being_written_counts_when_room_is_made(tmp_path: Path) -> None:
    space = FileSpace(tmp_path, 10 * SIZE)
    fill(space, 8)
    with space.room_for(SIZE), space.room_for(SIZE):  # and no file yet
        take(space)
        assert names(tmp_path) == sorted([page("ffff"), *(page(str(index)) for index in range(2, 8))])


def test_a_file_that_gets_its_name_while_files_are_looked_at_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's file is written and named behind the look at its folder, which has not seen its new name."""
    space = FileSpace(tmp_path, 10 * SIZE)
    fill(space, 9)
    listed, look = threading.Event(), tier.stored_files

    def write_other() -> None:
        with space.room_for(SIZE):
            writing.set()
            listed.wait()
            write(tmp_path, page("d"))

    def look_slowly(folder: Path) -> Iterator[tier.StoredFile]:
        found = list(look(folder))
        listed.set()
        other.join()
        yield from found

    writing, other = threading.Event(), threading.Thread(target=write_other)
    other.start()
    assert writing.wait(60)
    monkeypatch.setattr(tier, "stored_files", look_slowly)
    take(space)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) <= 10 * SIZE


@pytest.mark.parametrize("content", ["", "no number", "-5"])
def test_a_damaged_count_is_counted_anew(tmp_path: Path, content: str) -> None:
    write(tmp_path, page("a"))
    (tmp_path / COUNT_FILE).write_text(content)
    take(FileSpace(tmp_path, 10 * SIZE))
    assert counted(tmp_path) == 2 * SIZE


def test_servers_with_one_folder_share_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads the count and writes it behind a switch of threads: without the lock one of them would be lost."""
    read = tier.Count.read

    def slow(count: tier.Count) -> int | None:
        total = read(count)
        time.sleep(0.002)
        return total

    monkeypatch.setattr(tier.Count, "read", slow)
    spaces = [FileSpace(tmp_path, 1000 * SIZE) for _ in range(4)]

    def write_ten(space: FileSpace) -> None:
        for _ in range(10):
            with space.room_for(SIZE):
                pass

    threads = [threading.Thread(target=write_ten, args=(space,)) for space in spaces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted(tmp_path) == 40 * SIZE


def test_files_that_are_to_stay_do_so_for_half_of_the_room() -> None:
    now = 1e9
    kept = [StoredFile(f"kept {number}", 1, now + LATER_SECONDS - number) for number in range(4)]
    others = [StoredFile(f"other {number}", 1, now - 10 * number) for number in range(4)]
    order = [file.path for file in in_order_of_removal([*kept, *others], 2, now)]
    assert order == ["other 3", "other 2", "other 1", "kept 3", "kept 2", "other 0", "kept 1", "kept 0"]
