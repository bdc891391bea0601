"""The room that the files of a library may take: what was not used for longest is removed to make room.

All servers with the same folder share one count of bytes, in a file that each of them locks while it changes it. Bytes
are counted before they are written. Where files were removed by hand the count is too high, and is put right by the
next look at all files. Such a look does not see what another server is about to write, which is at most a page for each
of its threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

COUNT_FILE = ".bytes"
KEPT = 0.9
"""Of the limit, what stays when room is made: then all files are looked at once in so many writes, not at each."""
ABANDONED_SECONDS = 3600.0
"""A file that is still being written after so long was left by a server that was killed."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a page, or what is left of one (``*.tmp``)."""

    path: str
    num_bytes: int
    used: float


class FileSpace:
    """Counts and bounds the bytes of all files below a folder.

    Args:
        folder: of the library; it exists.
        limit: in bytes.
        removed: is told of each file that was removed to make room, by its path.
    """

    def __init__(self, folder: Path, limit: int, removed: Callable[[str], None] = lambda path: None) -> None:
        self.folder = folder
        self.limit = limit
        self.removed = removed
        self.being_written = 0  # bytes, by this process
        self.lock = threading.Lock()

    @contextmanager
    def room_for(self, num_bytes: int) -> Iterator[None]:
        """Count so many bytes that are written within the block, and make room for them. A failed write takes none.

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

    def note_used(self, path: str, used: float) -> bool:
        """Note when a page was used, so that its file stays; whether it has a file.

        Args:
            used: in seconds since 1970. A file that counts as used later already stays as it is.
        """
        try:
            if os.stat(path).st_mtime < used:
                os.utime(path, (used, used))
        except OSError:
            return False
        return True

    def _make_room(self, num_bytes: int) -> int:
        """Remove files until so many more fit; returns the bytes of those that stay."""
        writing = self.being_written  # read first: a file that gets its name meanwhile may be missed below
        files = list(stored_files(self.folder))
        now, total = time.time(), writing + sum(file.num_bytes for file in files)
        for file in files:
            if file.path.endswith(".tmp") and now - file.used > ABANDONED_SECONDS:
                total -= self._remove(file)
        if total + num_bytes <= self.limit:
            return total
        pages = sorted((file for file in files if file.path.endswith(".bin")), key=lambda file: file.used)
        for file in pages:
            if total + num_bytes <= KEPT * self.limit:
                break
            total -= self._remove(file)
        return total

    def _remove(self, file: StoredFile) -> int:
        """The bytes that this frees; 0 where the file can't be removed."""
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
    """The count in its file, which is locked."""

    descriptor: int

    def read(self) -> int | None:
        """The bytes; None: nobody has counted them yet."""
        text = os.pread(self.descriptor, 32, 0)
        return int(text) if text.strip().isdigit() else None

    def write(self, total: int) -> None:
        os.pwrite(self.descriptor, b"%-24d\n" % total, 0)


def stored_files(folder: Path) -> Iterator[StoredFile]:
    """The files of pages below a folder, of every model, and those that are being written."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".bin", ".tmp")):
                path = os.path.join(parent, name)
                with suppress(OSError):  # removed meanwhile
                    state = os.lstat(path)
                    yield StoredFile(path, state.st_size, state.st_mtime)
