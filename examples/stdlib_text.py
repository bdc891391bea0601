"""Text that every Python installation carries: the standard library's sources, as byte tokens.

Left out is what distributions package apart or generate (tests, tkinter, idlelib, build configuration), and the code
pages in `encodings`, tables so alike that a split by file would not part them. Every 16th file or so, by a hash of its
name, is for validation. The sources change with the Python version, and so do the figures: `Text.digest` says which
text it was.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

END = 256
"""The token that ends a file, `<|end|>` of the byte tokenizer."""
LEFT_OUT = {
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "tkinter",
}
GENERATED = ("_sysconfig", "config-")


@dataclass(frozen=True)
class Text:
    """Both splits as one stream of tokens each, int16."""

    train: Tensor
    validation: Tensor
    digest: str
    """SHA-256 of both streams, shortened."""


def byte_ids() -> Tensor:
    """Byte -> token of `byte_tokenizer`, (256,) int16.

    A byte-level vocabulary writes each byte as a character: printable ones of Latin-1 as themselves, the others as
    those from U+0100 on. The tokens are in these characters' order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    ids = torch.empty(256, dtype=torch.int16)
    ids[torch.tensor(order)] = torch.arange(256, dtype=torch.int16)
    return ids


def sources() -> list[Path]:
    """The files, relative to the standard library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size)
    kept = (name for name in names if not LEFT_OUT & set(name.parts) and not name.parts[0].startswith(GENERATED))
    return sorted(kept, key=Path.as_posix)


def is_validation(name: Path) -> bool:
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % 16 == 0


def load_text() -> Text:
    """Read the standard library of the running interpreter."""
    root, ids = Path(sysconfig.get_paths()["stdlib"]), byte_ids()
    splits: dict[bool, list[Tensor]] = {False: [], True: []}
    for name in sources():
        content = torch.frombuffer(bytearray((root / name).read_bytes()), dtype=torch.uint8)
        splits[is_validation(name)] += [ids[content.int()], torch.tensor([END], dtype=torch.int16)]
    train, validation = torch.cat(splits[False]), torch.cat(splits[True])
    digest = hashlib.sha256(train.numpy().tobytes() + validation.numpy().tobytes()).hexdigest()[:16]
    return Text(train, validation, digest)


def batch(stream: Tensor, size: int, length: int, *, seed: int, step: int) -> Tensor:
    """(size, length + 1) int64: `length` inputs and, one later, targets. A function of seed and step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length, (size,), generator=generator)
    return stream[starts[:, None] + torch.arange(length + 1)].long()


def windows(stream: Tensor, count: int, length: int) -> Tensor:
    """(count, length + 1) int64: windows spread evenly over the stream, the same on each call."""
    starts = torch.linspace(0, len(stream) - length - 1, count).long()
    return stream[starts[:, None] + torch.arange(length + 1)].long()
