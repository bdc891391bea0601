"""The option of the library of pages: `--star-library DIR[:MEMORY[:FILES]]`."""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from starling.config.parsing import OptionError

DEFAULT_MEMORY = "4GiB"
FORM = "DIR[:MEMORY[:FILES]]"
EXPECTED = "DIR, DIR:MEMORY, DIR:MEMORY:FILES or :MEMORY, as in /var/lib/pages:16GiB:200GiB"
SIZE = re.compile(r"-?[0-9.]+ ?[a-zA-Z]*")
SMALLEST = 2**20
SHARED_MEMORY = Path("/dev/shm")
"""Folder in which vLLM keeps the library's host memory."""


@dataclass(frozen=True)
class LibraryOptions:
    """Place and size of the library, for pages that leave the engine's own memory, or might.

    Attributes:
        folder: folder for files, or None if pages stay in host memory.
        host_bytes: host memory of each engine.
        file_bytes: maximum size of the files of all servers with this folder: as much as the memory where the option
            has one size. 0 without a folder.
    """

    folder: Path | None
    host_bytes: int
    file_bytes: int

    @property
    def described(self) -> str:
        """Return both bounds, for the log."""
        memory = f"{human(self.host_bytes)} of host memory for each engine"
        files = "" if self.folder is None else f", and up to {human(self.file_bytes)} of files in {self.folder}"
        return memory + files


def human(num_bytes: int) -> str:
    """Return a size in words, such as 4.0GiB."""
    return ByteSize(num_bytes).human_readable()


def parse_library(value: Any, name: str) -> LibraryOptions:
    """Parse the option; ``name`` is for messages (raises OptionError)."""
    if not isinstance(value, str) or not value:
        raise OptionError(name, value, "it must be a folder, a size in memory, or both", EXPECTED)
    folder, sizes = value, list[int]()
    while len(sizes) < 2 and ":" in folder and SIZE.fullmatch(folder.rpartition(":")[2]):
        folder, _, size = folder.rpartition(":")
        sizes.insert(0, parse_size(size, value, name))
    if not folder and len(sizes) == 2:
        raise OptionError(name, value, "it has a size of files and no folder", EXPECTED)
    memory = sizes[0] if sizes else parse_size(DEFAULT_MEMORY, value, name)
    if not folder:
        return LibraryOptions(None, memory, 0)
    return LibraryOptions(Path(folder).expanduser().resolve(), memory, sizes[-1] if sizes else memory)


def parse_size(size: str, value: str, name: str) -> int:
    """Return the bytes of one size of the option (raises OptionError)."""
    try:
        num_bytes = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise OptionError(name, value, f"{size!r} is no size", EXPECTED) from None
    if num_bytes < SMALLEST:
        raise OptionError(name, value, f"{num_bytes} bytes are less than a page of any model", "1MiB or more")
    return num_bytes


def why_not_private(folder: Path) -> str | None:
    """Return why others could choose what a folder's files hold, or None if they can't (raises OSError)."""
    state, user = folder.stat(), os.geteuid()
    if state.st_uid != user:
        return f"{folder} belongs to the user {state.st_uid}, and the server runs as {user}"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        permissions = stat.S_IMODE(state.st_mode)
        return f"others can write to {folder} ({permissions:04o}), and so choose what documents say to the model"
    return None


def check_place(options: LibraryOptions, value: Any, name: str) -> None:
    """Check that this machine has the memory and the folder for a library; makes the folder.

    Args:
        value: value of the option, and ``name`` its name, for messages.

    Raises:
        OptionError: there is not so much memory or disk, files can't be written, or others can write them.
    """
    memory = shutil.disk_usage(SHARED_MEMORY)
    if options.host_bytes > memory.total:
        reason = f"{SHARED_MEMORY} has {human(memory.total)} in all, and MEMORY is {human(options.host_bytes)}"
        allowed = f"up to {human(memory.total)}, or a larger one (of a container: --shm-size or --ipc=host)"
        raise OptionError(name, value, reason, allowed)
    if options.folder is None:
        return
    try:
        options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refusal = why_not_private(options.folder)
        if refusal is not None:
            raise OptionError(name, value, refusal, f"a folder of the server's own, such as {options.folder}/starling")
        probe = options.folder / f".starling-{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink()
        disk = shutil.disk_usage(options.folder).total
    except OSError as error:
        reason = f"files can't be written to {options.folder}: {error.strerror or error}"
        raise OptionError(name, value, reason, "a folder to which the server's user can write") from None
    if options.file_bytes > disk:
        reason = f"its disk has {human(disk)} in all, and the files may take {human(options.file_bytes)}"
        raise OptionError(name, value, reason, f"{FORM} with FILES up to {human(disk)}")
