"""The library's files: vLLM's file tier for one model and its weights, with a check of each file that is read."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult, OffloadingEvent, OffloadKey, make_offload_key
from vllm.v1.kv_offload.tiering.fs.io import batch_load_block, batch_store_block
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from starling.config.library import FORM
from starling.config.parsing import OptionError
from starling.features.library.identity import LENGTH, digest, has_stamp, write_stamp
from starling.vllm_compat.metrics import report_to_front
from starling.vllm_compat.offloading import FileTier, ends_within, say_io_errors_once

COUNT_FILE = ".bytes"
KEPT = 0.9
"""Share of the limit that stays when room is made, so that not every write has to scan all files."""
LATER_SECONDS = 86400.0
"""Seconds by which a page that is to stay counts as used later."""
LATER = 0.5
"""Share of the limit that may be taken by files that count as used later than now."""
ABANDONED_SECONDS = 3600.0
"""Seconds after which a file that is still being written counts as left by a server that was killed."""


MODEL_FOLDER = re.compile(r"[0-9a-f]{16}_[0-9a-f]{16}_r[0-9]+")
"""Name of a model's folder: an identity, a layout of pages, and a rank (tier.py)."""
FIRST_FOLDER, SECOND_FOLDER = re.compile(r"[0-9a-f]{3}"), re.compile(r"[0-9a-f]{2}_g[0-9]+")
"""Names of the folders of the first digits of a page's hash (vLLM's FileMapper); the second has the KV cache group."""
PAGE_FILE = re.compile(r"[0-9a-f]{16,}\.bin(_[0-9]+\.tmp)?")
"""Name of a page's file: its hash. While vLLM writes the file, its name ends with a number and ``.tmp``."""


@dataclass(frozen=True)
class StoredFile:
    """The file of a page, or the rest of an unfinished one (``*.tmp``)."""

    path: str
    num_bytes: int
    used: float


class FileSpace:
    """Count and bound of the bytes of all files below a folder.

    Args:
        folder: the library's folder; it exists.
        limit: the limit in bytes.
        removed: called with the path of each file that was removed to make room.
    """

    def __init__(self, folder: Path, limit: int, removed: Callable[[str], None] = lambda path: None) -> None:
        self.folder = folder
        self.limit = limit
        self.removed = removed
        self.being_written = 0  # bytes, by this process
        self.lock = threading.Lock()

    @contextmanager
    def room_for(self, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` that are written within the block, and make room for them; a failed write takes none.

        Raises:
            OSError: there is no room (EDQUOT), or the count can't be read or written.
        """
        with self._count() as count:
            total = count.read()
            if total is None or total + num_bytes > self.limit:
                total = self._make_room(num_bytes)
            if total + num_bytes > self.limit:
                count.write(total)
                raise OSError(errno.EDQUOT, "all that the library's files may take is taken", str(self.folder))
            with self.lock:
                self.being_written += num_bytes
            count.write(total + num_bytes)
        try:
            yield
        except BaseException:
            with self._count() as count:
                count.write(max((count.read() or 0) - num_bytes, 0))
            raise
        finally:
            with self.lock:
                self.being_written -= num_bytes

    def note_used(self, path: str, used: float) -> None:
        """Note when a page was used, so that its file stays, if it has one.

        Args:
            used: seconds since 1970. A file that already counts as used later stays as it is.
        """
        with suppress(OSError):
            if os.stat(path).st_mtime < used:
                os.utime(path, (used, used))

    def _make_room(self, num_bytes: int) -> int:
        """Remove files until ``num_bytes`` more fit; return the bytes of the files that stay."""
        writing = self.being_written  # read first: a file that gets its name meanwhile may be missed below
        files = list(stored_files(self.folder))
        now, total = time.time(), writing + sum(file.num_bytes for file in files)
        for file in files:
            if file.path.endswith(".tmp") and now - file.used > ABANDONED_SECONDS:
                total -= self._remove(file)
        if total + num_bytes <= self.limit:
            return total
        pages = [file for file in files if file.path.endswith(".bin")]
        for file in in_order_of_removal(pages, LATER * self.limit, now):
            if total + num_bytes <= KEPT * self.limit:
                break
            total -= self._remove(file)
        return total

    def _remove(self, file: StoredFile) -> int:
        """Remove a file; return the bytes that this frees, or 0 if it can't be removed."""
        try:
            os.remove(file.path)
        except FileNotFoundError:
            return file.num_bytes
        except OSError:
            return 0
        self.removed(file.path)
        return file.num_bytes

    @contextmanager
    def _count(self) -> Iterator[Count]:
        descriptor = os.open(self.folder / COUNT_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # of this descriptor: other threads wait as well
            yield Count(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Count:
    """The count of bytes in its file, which is locked."""

    descriptor: int

    def read(self) -> int | None:
        """Return the count of bytes, or None if nobody has counted them yet."""
        text = os.pread(self.descriptor, 32, 0)
        return int(text) if text.strip().isdigit() else None

    def write(self, total: int) -> None:
        os.pwrite(self.descriptor, b"%-24d\n" % total, 0)


def in_order_of_removal(files: Iterable[StoredFile], later_bytes: float, now: float) -> list[StoredFile]:
    """Sort files by their last use.

    Files count as used later than now up to ``later_bytes``, the latest first; the others lose LATER_SECONDS.
    """
    order = sorted(files, key=lambda file: file.used)
    later = list(takewhile(lambda file: file.used > now, reversed(order)))
    total = list(accumulate(file.num_bytes for file in later))
    above = {file.path for file, all_bytes in zip(later, total, strict=True) if all_bytes > later_bytes}
    return sorted(order, key=lambda file: file.used - LATER_SECONDS * (file.path in above))


def stored_files(folder: Path) -> Iterator[StoredFile]:
    """Yield the files of pages in a library's folder, of every model, and those that are being written.

    Other files, such as a checkpoint in the same folder, are not the library's: they neither count nor make room.
    """
    for model in _folders(str(folder), MODEL_FOLDER):
        for first in _folders(model, FIRST_FOLDER):
            for second in _folders(first, SECOND_FOLDER):
                for entry in _entries(second):
                    if PAGE_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        with suppress(OSError):  # removed meanwhile
                            state = entry.stat(follow_symlinks=False)
                            yield StoredFile(entry.path, state.st_size, state.st_mtime)


def _folders(parent: str, name: re.Pattern[str]) -> list[str]:
    """Return the folders of ``parent`` whose names match ``name``, without links."""
    return [
        entry.path for entry in _entries(parent) if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, none if it was removed meanwhile or can't be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


class LibraryMetrics:
    """Series of the engine core's process."""

    def __init__(self) -> None:
        report_to_front()
        self.bad_files = Counter(
            "starling:library_bad_files",
            "Files of the library that could not be read or were not what was written; their pages were computed.",
        )
        self.removed_files = Counter(
            "starling:library_removed_files", "Files of the library that were removed to make room for others."
        )
        self.failed_writes = Counter(
            "starling:library_failed_writes", "Writes of pages to files that failed, as on a full disk."
        )


library_metrics = functools.cache(LibraryMetrics)


logger = init_logger("vllm.starling")

LOG_SECONDS = 10.0
"""Seconds between two lines of the log about files that could not be read or written."""

WRITE_SECONDS, END_SECONDS = 1.5, 0.5
"""Seconds for the last writes, and then for the threads: vLLM kills an engine 3 s after its signal to end."""

SETTINGS_FILE = "config.json"


class LibraryTier(FileTier, FileSystemTierManager):
    """Pages in files, which are found under the identity of the engine's model only.

    There is a folder for each identity and each layout of pages. An identity is a digest of the weights and of what
    else the content of a page depends on. vLLM's own folder, whose name also has the model as the user wrote it, has no
    pages. Until the engine has given its identity, and after it has changed its weights, no file is read or written.

    The files belong to the user that runs the engine: nobody else can read them. Together they take at most
    ``file_bytes``, whatever models and servers have written them.
    """

    def __init__(self, *, file_bytes: int, **settings: Any) -> None:
        self.folder = folder = Path(settings["root_dir"])
        make_private(folder)
        super().__init__(**settings)
        if self.block_size_bytes > file_bytes:
            reason = f"the file of one page of this model takes {self.block_size_bytes} bytes"
            raise OptionError(
                "star_library", file_bytes, reason, f"{FORM} with FILES of {self.block_size_bytes} or more"
            )
        self.space = FileSpace(folder, file_bytes, self._removed)
        self.removed: deque[OffloadKey] = deque()
        self.used: dict[OffloadKey, float] = {}
        self.later: dict[OffloadKey, float] = {}
        self.lock = threading.Lock()
        self.is_open = False
        self.logged = float("-inf")
        say_io_errors_once()
        self.metrics = library_metrics()

    def open(self, identity: str, described: dict[str, Any]) -> None:
        """Read and write the files of an identity.

        Args:
            identity: the start of the folder's name.
            described: what the identity stands for, to be read by people.
        """
        layout = {name: value for name, value in self.file_mapper.get_run_config().items() if name != "model_name"}
        folder = self.folder / f"{identity}_{digest(layout)[:LENGTH]}"
        make_private(folder)
        settings = folder / SETTINGS_FILE
        if not settings.exists():
            settings.write_text(json.dumps(described | layout, indent=2, sort_keys=True, default=str) + "\n")
        self.file_mapper.base_path = str(folder)
        make_private(Path(f"{folder}_r{self.file_mapper.rank}"))
        self.is_open = True
        logger.info("The library's pages are in %s", folder)

    def close(self, reason: str) -> None:
        """Stop reading and writing files."""
        if self.is_open:
            self.is_open = False
            logger.warning("The library's files are not used any more: %s", reason)

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        return super().lookup(key, req_context) if self.is_open else LookupResult.MISS

    def note_used(self, keys: Iterable[OffloadKey], later: float = 0) -> None:
        """Note that a request has used pages, wherever they came from: their files are the last to be removed.

        Args:
            later: seconds by which they count as used later than now, also a page that gets its file only later.
        """
        if not self.is_open:
            return
        when = time.time() + later
        with self.lock:
            for key in keys:
                self.used[key] = max(self.used.get(key, when), when)
                if later:
                    self.later[key] = when
            while len(self.later) > self.num_chunks:  # pages without a file are in host memory
                del self.later[next(iter(self.later))]

    def write_used(self) -> None:
        """Write what ``note_used`` has noted into the files' times. A thread does it before it makes room."""
        with self.lock:
            used, self.used = self.used, {}
        for key, when in used.items():
            self.space.note_used(self.file_mapper.get_file_name(key), when)

    @property
    def num_chunks(self) -> int:
        """Number of pages in host memory."""
        return len(self.chunks_as_bytes()) // self.block_size_bytes

    def take_events(self) -> Iterable[OffloadingEvent]:
        yield from super().take_events()
        removed = [self.removed.popleft() for _ in range(len(self.removed))]
        if removed:
            yield OffloadingEvent(keys=removed, medium=self.medium, removed=True, locality=self.locality)

    def _removed(self, path: str) -> None:
        """Count a file that has made room for others; if it had a page of this engine, the KV events say so."""
        self.metrics.removed_files.inc()
        if (
            self.events is not None
            and self.is_open
            and path.startswith(f"{self.file_mapper.base_path}_r{self.file_mapper.rank}/")
        ):
            file = Path(path)
            with suppress(ValueError):
                group = int(file.parent.name.rpartition("_g")[2])
                self.removed.append(make_offload_key(bytes.fromhex(file.stem), group))

    def shutdown(self) -> None:
        """Write what is still to be written, within the time that the engine may take for that, and end the threads.

        Raises:
            TimeoutError: a thread has not ended, since the disk does not answer: it may still use the memory of chunks.
        """
        if not self.is_idle_within(WRITE_SECONDS):
            logger.warning(
                "The library's last pages are not written: the disk has not taken them within %g s", WRITE_SECONDS
            )
        if not ends_within(self.write_used, END_SECONDS) or not ends_within(super().shutdown, END_SECONDS):
            raise TimeoutError("the disk of the library's files does not answer")

    # What vLLM's tier runs in its threads.

    def store_pages(self, keys: list[OffloadKey], chunk_ids: list[int]) -> None:
        """Write chunks into files that do not exist yet (raises OSError)."""
        if not self.is_open:
            return
        self.write_used()
        view, size, path = self.chunks_as_bytes(), self.block_size_bytes, self.file_mapper.base_path
        try:
            for key, chunk in zip(keys, chunk_ids, strict=True):
                path = self.file_mapper.get_file_name(key)
                if os.path.exists(path):
                    continue
                write_stamp(view[chunk * size : (chunk + 1) * size], key)
                with self.space.room_for(size):
                    batch_store_block([path], view, [chunk * size], size, self.uses_o_direct)
                    os.chmod(path, 0o600)
                if (when := self.later.pop(key, None)) is not None:
                    self.space.note_used(path, when)
        except OSError as error:
            self.metrics.failed_writes.inc()
            hint = " (the disk is full)" if is_full(error, Path(path).parent, size) else ""
            self._log("A page of the library was not written: %s%s", error, hint)
            raise

    def load_pages(self, keys: list[OffloadKey], chunk_ids: list[int]) -> None:
        """Read files into chunks, in their order, up to the first file with the wrong content.

        Raises:
            OSError: ``num_succeeded`` is the number of files before it.
        """
        view, size = self.chunks_as_bytes(), self.block_size_bytes
        for index, (key, chunk) in enumerate(zip(keys, chunk_ids, strict=True)):
            path = self.file_mapper.get_file_name(key)
            try:
                batch_load_block([path], view, [chunk * size], size, self.uses_o_direct)
                if not has_stamp(view[chunk * size : (chunk + 1) * size], key):
                    remove(path)
                    raise OSError(errno.EBADMSG, "it is not what was written for this page", path)
            except OSError as error:
                if os.path.isdir(path):
                    remove_folder(path)
                if not isinstance(error, FileNotFoundError):  # else it has made room for others
                    self.metrics.bad_files.inc()
                    self._log("A file of the library is not used, and its page is computed: %s", error)
                error.num_succeeded = index  # type: ignore[attr-defined]
                raise

    def _log(self, message: str, *values: Any) -> None:
        now = time.monotonic()
        if now - self.logged >= LOG_SECONDS:
            self.logged = now
            logger.warning(message, *values)


def is_full(error: OSError, folder: Path, size: int) -> bool:
    """Return whether a write of ``size`` bytes has failed for lack of space; vLLM reports a short write as EIO."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < size


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter; folders that exist keep their permissions."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def remove(path: str) -> None:
    """Remove a file if that is possible."""
    try:
        os.remove(path)
    except OSError as error:
        logger.warning("A bad file of the library stays where it is: %s", error)


def remove_folder(path: str) -> None:
    """Remove an empty folder in the place of a page's file; the content of other folders is not the library's."""
    try:
        os.rmdir(path)
    except OSError as error:
        logger.warning_once("A folder is in the place of a file of the library, and stays there: %s", error)
