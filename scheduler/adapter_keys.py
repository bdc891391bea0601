"""LoRA adapters in the keys of a library's pages: another server may have another adapter of the same name.

vLLM's keys have an adapter's name and path. With a library, pages also have a digest of the adapter's files. Where the
files are not known, or have changed since the engine first saw them, it is not known which ones the engine has loaded:
then the key is one that no other engine has.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

Files = tuple[tuple[str, int, int], ...]
"""Name, size and time of the last change of each file."""


class AdapterKeys:
    """The key of each adapter, as a part of those of a page. Reads an adapter's files at its first request."""

    def __init__(self) -> None:
        self.mine = uuid.uuid4().hex
        self.first: dict[str, tuple[Files, str]] = {}  # by path
        self.of_requests: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()

    def keys(self, request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
        """Return the keys of a request's page over positions ``[start, end)``, the same for all of its pages."""
        if request.lora_request is None:
            return ()
        if request not in self.of_requests:
            self.of_requests[request] = ("lora", self.key_of(Path(request.lora_request.lora_path)))
        return (self.of_requests[request],)

    def key_of(self, folder: Path) -> str:
        """Return the key of an adapter whose files are in a folder."""
        files = files_in(folder)
        if str(folder) not in self.first:
            self.first[str(folder)] = files, digest(folder, files) if files else self.mine
        first, key = self.first[str(folder)]
        return key if files == first else f"{self.mine} {files}"


def files_in(folder: Path) -> Files:
    """Return the files of a folder; none if it is no folder, as for a name on a hub."""
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def digest(folder: Path, files: Files) -> str:
    """Return the digest of the content of these files of a folder."""
    total = hashlib.sha256()
    for name, size, _ in files:
        total.update(f"{name} {size}\n".encode())
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


_adapters = AdapterKeys()


def adapter_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Return the keys of a request's page for its adapter, the same for all of its pages."""
    return _adapters.keys(request, start, end)
