"""The files of the library: what is no page of this engine is a miss, and nothing that a disk does ends a request."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import OffloadingGroupConfig
from vllm.v1.kv_offload.tiering.base import TransferJob

from starling.config.parsing import OptionError
from starling.features.library import tier as tier_module
from starling.features.library.connector import close_after_change
from starling.features.library.identity import STAMP_BYTES, has_stamp, identity_of, write_stamp
from starling.features.library.tier import COUNT_FILE, MODEL_FOLDER, LibraryTier, stored_files
from starling.vllm_compat import core_process
from starling.vllm_compat.core_process import on_worker_call

CHUNKS, SIZE = 4, 4096
KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(CHUNKS)]
CONTEXT = ReqContext(req_id="a")


def spec(model: str = "models/tiny", events: bool = False) -> Any:
    parallel = SimpleNamespace(
        tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True, world_size=1
    )
    config = SimpleNamespace(
        groups=(OffloadingGroupConfig(tokens_per_block=32, layer_names=("layer",), group_id=0),),
        model=SimpleNamespace(name=model, dtype="float32"),
        cache=SimpleNamespace(tokens_per_hash=32, blocks_per_chunk=1),
        parallel=parallel,
        replicated_layout=False,
        canonical_layout=False,
        kv_cache_layout=None,
    )
    events = SimpleNamespace(enable_kv_cache_events=events)
    return SimpleNamespace(config=config, blocks_per_chunk=1, kv_events_config=events)


class Library:
    """A tier with host memory of CHUNKS chunks, which have content."""

    def __init__(
        self,
        folder: Path,
        identity: str | None = "one",
        model: str = "models/tiny",
        room: int = 100,
        events: bool = False,
    ) -> None:
        memory = mmap.mmap(-1, CHUNKS * SIZE)  # in whole pages, as direct I/O needs it
        self.memory = np.frombuffer(memory, dtype=np.int8).reshape(CHUNKS, SIZE)
        self.tier = LibraryTier(
            offloading_spec=spec(model, events),
            primary_kv_view=memoryview(self.memory),
            tier_type="LibraryTier",
            root_dir=str(folder),
            file_bytes=room * SIZE,
            enable_kv_events=events,
            n_read_threads=1,
            n_write_threads=1,
        )
        if identity is not None:
            described = {"weights": identity}
            self.tier.open(identity_of(described), described)
        self.jobs = 0

    def fill(self) -> None:
        for number in range(CHUNKS):
            self.memory[number, :-STAMP_BYTES] = number + 1

    def run(self, submit: Any, chunks: list[int]) -> Any:
        self.jobs += 1
        keys = [KEYS[chunk] for chunk in chunks]
        submit(TransferJob(self.jobs, keys, np.array(chunks, dtype=np.int32), False, CONTEXT))
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        return result

    def store(self, *chunks: int) -> Any:
        return self.run(self.tier.submit_store, list(chunks))

    def load(self, *chunks: int) -> Any:
        return self.run(self.tier.submit_load, list(chunks))

    def lookup(self, chunk: int) -> LookupResult:
        """What the tier says in the end."""
        deadline = time.monotonic() + 30
        while (found := self.tier.lookup(KEYS[chunk], CONTEXT)) is LookupResult.RETRY:
            assert time.monotonic() < deadline
            self.tier.on_schedule_end(None)
        self.tier.on_request_finished(CONTEXT)
        return found

    def path(self, chunk: int) -> Path:
        return Path(self.tier.file_mapper.get_file_name(KEYS[chunk]))


@pytest.fixture
def opened() -> Iterator[list[Library]]:
    """Libraries that are shut down at the end."""
    libraries: list[Library] = []
    yield libraries
    for library in libraries:
        library.tier.shutdown()


@pytest.fixture
def stored(tmp_path: Path, opened: list[Library]) -> Library:
    """A library in whose files all chunks are, and whose memory is empty."""
    library = Library(tmp_path)
    opened.append(library)
    library.fill()
    assert library.store(*range(CHUNKS)).success
    library.memory[:] = 0
    return library


def test_a_stamp_is_that_of_a_key_and_a_content() -> None:
    chunk = memoryview(bytearray(range(200)))
    write_stamp(chunk, b"key")
    assert has_stamp(chunk, b"key")
    assert not has_stamp(chunk, b"other")
    chunk[0] += 1
    assert not has_stamp(chunk, b"key")


def test_what_was_stored_is_loaded(stored: Library) -> None:
    assert stored.lookup(2) is LookupResult.HIT
    assert stored.load(2, 0).success
    assert set(stored.memory[2, :-STAMP_BYTES]) == {3}
    assert set(stored.memory[0, :-STAMP_BYTES]) == {1}


def test_files_and_folders_are_for_their_user_alone(stored: Library, tmp_path: Path) -> None:
    assert stored.path(0).stat().st_mode & 0o777 == 0o600
    folder = stored.path(0).parents[2]
    assert MODEL_FOLDER.fullmatch(folder.name)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert tmp_path in folder.parents


@pytest.mark.parametrize("damage", ["truncated", "longer", "changed", "of another page", "empty"])
def test_a_file_that_is_not_what_was_written_is_a_miss(stored: Library, damage: str) -> None:
    path, content = stored.path(1), bytearray(stored.path(1).read_bytes())
    if damage == "truncated":
        content = content[:100]
    elif damage == "longer":
        content = content[:1000] + content
    elif damage == "changed":
        content[50] ^= 1
    elif damage == "of another page":
        content = bytearray(stored.path(2).read_bytes())
    else:
        content = bytearray()
    path.write_bytes(content)
    before = stored.tier.metrics.bad_files._value.get()
    result = stored.load(0, 1, 2)
    assert not result.success
    assert result.successful_keys == (KEYS[0],)
    assert stored.tier.metrics.bad_files._value.get() == before + 1
    assert not path.exists(), "a good one can be written"
    stored.fill()
    assert stored.store(1).success
    assert stored.load(1).success


@pytest.mark.parametrize("identity", ["two", None])
def test_another_engine_finds_nothing(
    stored: Library, opened: list[Library], tmp_path: Path, identity: str | None
) -> None:
    opened.append(other := Library(tmp_path, identity))
    assert other.lookup(0) is LookupResult.MISS
    assert stored.lookup(0) is LookupResult.HIT


@pytest.mark.parametrize("model", ["models/tiny", "/a/path/to/models/tiny"])
def test_the_same_engine_finds_all_after_a_restart(
    stored: Library, opened: list[Library], tmp_path: Path, model: str
) -> None:
    """However the model's path is written."""
    opened.append(again := Library(tmp_path, model=model))
    assert again.lookup(3) is LookupResult.HIT
    assert again.load(3).success
    assert set(again.memory[3, :-STAMP_BYTES]) == {4}


def test_a_closed_library_neither_reads_nor_writes(stored: Library) -> None:
    stored.tier.close("the weights have changed")
    assert stored.lookup(0) is LookupResult.MISS
    stored.path(0).unlink()
    assert stored.store(0).success
    assert not stored.path(0).exists()


def test_a_full_disk_fails_the_write_alone(
    stored: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stored.path(0).unlink()
    before = stored.tier.metrics.failed_writes._value.get()
    with monkeypatch.context() as patch:
        patch.setattr(tier_module, "batch_store_block", full)
        assert not stored.store(0).success
    assert stored.tier.metrics.failed_writes._value.get() == before + 1
    assert "(the disk is full)" in caplog.text and "block I/O failed" not in caplog.text
    stored.fill()
    assert stored.store(0).success
    assert stored.lookup(0) is LookupResult.HIT


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_folder_in_the_place_of_a_file_is_removed_if_it_is_empty(stored: Library, is_empty: bool) -> None:
    """What is in it is not the library's. Its page is computed, and all others are found."""
    path = stored.path(1)
    path.unlink()
    path.mkdir()
    if not is_empty:
        (path / "pytorch_model.bin").touch()
    before = stored.tier.metrics.bad_files._value.get()
    assert not stored.load(1).success
    assert stored.load(0, 2).success
    assert path.exists() == (not is_empty)
    assert stored.tier.metrics.bad_files._value.get() == before + 1
    stored.fill()
    assert stored.store(1).success
    assert path.is_file() == is_empty


def test_all_files_of_pages_count(stored: Library, tmp_path: Path) -> None:
    assert {file.path for file in stored_files(tmp_path)} == {str(stored.path(chunk)) for chunk in range(CHUNKS)}


def test_what_a_killed_writer_left_is_never_read(stored: Library) -> None:
    path = stored.path(0)
    path.rename(path.with_name(path.name + "_123.tmp"))
    assert stored.lookup(0) is LookupResult.MISS


def test_what_is_to_be_written_is_written_before_the_end(tmp_path: Path) -> None:
    library = Library(tmp_path)
    library.fill()
    for chunk in range(CHUNKS):  # one thread writes, so that most of them wait
        library.tier.submit_store(TransferJob(chunk, [KEYS[chunk]], np.array([chunk]), False, CONTEXT))
    library.tier.shutdown()
    assert all(library.path(chunk).exists() for chunk in range(CHUNKS))


def test_a_disk_that_does_not_answer_delays_the_end_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is a FIFO, which nobody writes to: a thread waits in the kernel to open it."""
    monkeypatch.setattr(tier_module, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(tier_module, "END_SECONDS", 0.05)
    library = Library(tmp_path)
    library.path(0).parent.mkdir(parents=True)
    os.mkfifo(library.path(0))
    library.tier.submit_load(TransferJob(1, [KEYS[0]], np.array([0]), False, CONTEXT))
    assert not library.tier.is_idle_within(0.05)
    with pytest.raises(TimeoutError, match="does not answer"):
        library.tier.shutdown()
    writer = os.open(library.path(0), os.O_WRONLY)  # which the thread has waited for
    os.close(writer)


def test_the_files_are_closed_before_the_weights_may_change_where_an_engine_has_a_library() -> None:
    closed: list[str] = []
    library = SimpleNamespace(close_files=closed.append)
    for connector in (None, object(), library):  # a process may have several engines
        core = SimpleNamespace(scheduler=SimpleNamespace(connector=connector))
        close_after_change(core, "check_health")
        close_after_change(core, "reload_weights")
    assert closed == ["reload_weights may have changed the model's weights"]


def test_the_files_are_closed_beside_what_replicas_note_of_the_same_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "_worker_calls", [])
    closed: list[str] = []
    core = object.__new__(EngineCore)
    core.scheduler = SimpleNamespace(connector=SimpleNamespace(close_files=closed.append))
    core.model_executor = SimpleNamespace(collective_rpc=lambda *args, **kwargs: [])
    for _ in range(2):
        on_worker_call(close_after_change)
    core.collective_rpc("reload_weights")
    assert len(closed) == 1


def aged(library: Library) -> None:
    """Each file was used a second after the one before it, long ago."""
    for chunk in range(CHUNKS):
        if library.path(chunk).exists():
            os.utime(library.path(chunk), times=(1e9 + chunk,) * 2)


def test_a_page_that_was_not_used_makes_room_and_one_that_was_used_stays(tmp_path: Path, opened: list[Library]) -> None:
    opened.append(library := Library(tmp_path, room=3, events=True))
    library.fill()
    assert library.store(0, 1, 2).success
    assert [event.removed for event in library.tier.take_events()] == [False]
    aged(library)
    before = library.tier.metrics.removed_files._value.get()
    library.tier.note_used([KEYS[0], KEYS[3]])  # one of memory, and one that is in no file
    assert library.store(3).success
    assert [library.path(chunk).exists() for chunk in range(CHUNKS)] == [True, False, False, True]
    assert library.tier.metrics.removed_files._value.get() == before + 2
    stored, removed = library.tier.take_events()
    assert (stored.removed, removed.removed, removed.keys) == (False, True, [KEYS[1], KEYS[2]])


def test_a_page_that_is_to_stay_does_so_whoever_uses_it_next(tmp_path: Path, opened: list[Library]) -> None:
    opened.append(library := Library(tmp_path))
    library.fill()
    library.tier.note_used([KEYS[0]], later=1000)
    library.tier.note_used([KEYS[0], KEYS[1]])
    assert library.store(0, 1).success
    library.tier.note_used([KEYS[0], KEYS[1]])
    library.tier.write_used()
    assert [library.path(chunk).stat().st_mtime > time.time() + 500 for chunk in (0, 1)] == [True, False]
    assert not library.tier.later


def test_a_file_that_has_made_room_is_a_miss_and_no_bad_file(stored: Library, caplog: pytest.LogCaptureFixture) -> None:
    stored.path(1).unlink()
    before = stored.tier.metrics.bad_files._value.get()
    assert not stored.load(1).success
    assert stored.tier.metrics.bad_files._value.get() == before
    assert "is not used" not in caplog.text


def test_a_failed_write_takes_no_room(stored: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    stored.path(0).unlink()
    count = stored.tier.space.folder / COUNT_FILE
    before = count.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(tier_module, "batch_store_block", fail)
        assert not stored.store(0).success
    assert count.read_text() == before


def test_files_for_less_than_a_page_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"star_library=0 is refused: the file of one page .* takes {SIZE} bytes"):
        Library(tmp_path, room=0)
