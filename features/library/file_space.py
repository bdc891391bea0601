"""Disk space of a library's files: the file that was used least recently is removed first to make room.

Only files with the names that the library gives are counted and removed.

All servers with the same folder share one count of bytes, in a file that each of them locks while it changes it. Bytes
are counted before they are written. If files were removed by hand, the count is too high until the next scan of all
files corrects it. A scan does not see what another server is about to write, which is at most a page for each of its
threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

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
