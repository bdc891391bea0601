"""`--star-library DIR[:MEMORY[:FILES]]`, and whether this machine has the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from starling.config.entry import parse_config
from starling.config.library import LibraryOptions, check_place, parse_library
from starling.config.parsing import OptionError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "folder", "host_bytes", "file_bytes"),
    [
        ("/pages", "/pages", 4 * GIB, 4 * GIB),
        ("/pages:16GiB", "/pages", 16 * GIB, 16 * GIB),
        ("/pages:1GiB:200GiB", "/pages", GIB, 200 * GIB),
        ("/pages:1.5 GB", "/pages", 1_500_000_000, 1_500_000_000),
        (":512MiB", None, 512 * 2**20, 0),
        ("/a:b:2G", "/a:b", 2_000_000_000, 2_000_000_000),
        ("/a:b/c", "/a:b/c", 4 * GIB, 4 * GIB),
    ],
)
def test_a_folder_and_sizes(text: str, folder: str | None, host_bytes: int, file_bytes: int) -> None:
    expected = LibraryOptions(None if folder is None else Path(folder), host_bytes, file_bytes)
    assert parse_library(text, "star_library") == expected


@pytest.mark.parametrize(
    "value",
    ["", 4, None, ["/pages"], ":0", ":12", "/pages:7pages", ":1..5GiB", "/pages:-1", "/pages:1GiB:-1", ":1GiB:2GiB"],
)
def test_all_else_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"star_library=.* is refused: .*Allowed: "):
        parse_library(value, "star_library")


def check(text: str) -> None:
    check_place(parse_library(text, "star_library"), text, "star_library")


def test_a_place_that_this_machine_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for text, says in (
        (":900TiB", "/dev/shm has .* in all, and MEMORY is 900.0TiB"),
        (f"{tmp_path}:1MiB:90000TiB", "its disk has .* in all, and the files may take"),
        (f"{tmp_path}/file:1MiB", "files can't be written to .*/file: File exists"),
        (f"{tmp_path}/file/in:1MiB", "files can't be written to .*/file/in: Not a directory"),
    ):
        with pytest.raises(OptionError, match=says):
            check(text)
    check(f"{tmp_path}/new:1MiB")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    folder.chmod(mode)
    allowed = f"Allowed: a folder of the server's own, such as {folder}/starling"
    with pytest.raises(OptionError, match=rf"others can write to {folder} \({mode:04o}\), .*{allowed}"):
        check(f"{folder}:1MiB")
    check(f"{folder}/starling:1MiB")
    assert (folder / "starling").stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    check(f"{folder}:1MiB")


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = tmp_path.stat().st_uid
    monkeypatch.setattr("starling.config.library.os.geteuid", lambda: user + 1)
    with pytest.raises(OptionError, match=f"belongs to the user {user}, and the server runs as {user + 1}"):
        check(f"{tmp_path}:1MiB")


def test_the_entry_has_it() -> None:
    config = parse_config({"starling": {"star_library": "/pages"}})
    assert config is not None
    assert config.library == LibraryOptions(Path("/pages"), 4 * GIB, 4 * GIB)
    assert parse_config({"starling": {}}).library is None  # type: ignore[union-attr]
