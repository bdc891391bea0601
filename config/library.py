"""The option of the library of pages: `--star-library DIR[:SIZE]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from starling.config.parsing import OptionError

DEFAULT_SIZE = "4GiB"
EXPECTED = "DIR, DIR:SIZE or :SIZE, as in /var/lib/pages:16GiB"
SIZE = re.compile(r"(?P<folder>.*):(?P<size>[0-9.]+ ?[a-zA-Z]*)", re.DOTALL)
SMALLEST = 2**20


@dataclass(frozen=True)
class LibraryOptions:
    """Where pages go that leave the engine's own memory, or might.

    Attributes:
        folder: for files; None: pages stay in host memory.
        host_bytes: host memory of each engine.
    """

    folder: Path | None
    host_bytes: int


def parse_library(value: Any, name: str) -> LibraryOptions:
    """Parse the option; ``name`` is for messages (raises OptionError)."""
    if not isinstance(value, str) or not value:
        raise OptionError(name, value, "it must be a folder, a size in memory, or both", EXPECTED)
    found = SIZE.fullmatch(value)
    folder, size = (found["folder"], found["size"]) if found else (value, DEFAULT_SIZE)
    try:
        host_bytes = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise OptionError(name, value, f"{size!r} is no size", EXPECTED) from None
    if host_bytes < SMALLEST:
        raise OptionError(name, value, f"{host_bytes} bytes are less than a page of any model", "1MiB or more")
    return LibraryOptions(Path(folder).expanduser().resolve() if folder else None, host_bytes)
