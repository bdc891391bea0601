"""Training text that every Python installation has: the standard library's sources, as byte tokens.

The text excludes files that distributions package separately or generate (tests, tkinter, idlelib, build
configuration). It also excludes the code pages in `encodings`: these tables are so similar that a split by file would
not separate training from validation. About every 16th file, chosen by a hash of its name, is for validation. The
sources and so the figures change with the Python version; `Text.digest` identifies the text.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.random_llama import byte_tokenizer

END = 256
"""The token that ends a file, `<|end|>` of the byte tokenizer."""
EXCLUDED = {
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
    """The training and the validation split, each one stream of tokens."""

    train: Tensor
    validation: Tensor
    digest: str
    """SHA-256 of both streams, the first 16 digits."""
    token_bytes: Tensor = field(default_factory=lambda: torch.ones(END + 1, dtype=torch.int64))
    """(vocabulary,) bytes that each token stands for."""
    tokenizer: PreTrainedTokenizerFast = field(default_factory=byte_tokenizer)
    syllables: int = 0
    """How many of the last tokens of the vocabulary are syllables of names. If there are any, tokens of the streams
    from the size of the vocabulary on are identifiers, for `examples.package_text.rename` to spell."""


def byte_ids() -> Tensor:
    """Return (256,) int16, the token id of each byte in `byte_tokenizer`.

    A byte-level vocabulary represents each byte by a character: printable bytes of Latin-1 by themselves, the others by
    the characters from U+0100 on. The ids follow the order of these characters.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    ids = torch.empty(256, dtype=torch.int16)
    ids[torch.tensor(order)] = torch.arange(256, dtype=torch.int16)
    return ids


def sources() -> list[Path]:
    """Return the files, relative to the standard library's folder, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size)
    kept = (name for name in names if not EXCLUDED & set(name.parts) and not name.parts[0].startswith(GENERATED))
    return sorted(kept, key=Path.as_posix)


def is_validation(name: Path) -> bool:
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % 16 == 0


def load_text() -> Text:
    """Read the text from the standard library of the running interpreter."""
    root, ids = Path(sysconfig.get_paths()["stdlib"]), byte_ids()
    splits: dict[bool, list[Tensor]] = {False: [], True: []}
    for name in sources():
        content = torch.frombuffer(bytearray((root / name).read_bytes()), dtype=torch.uint8)
        splits[is_validation(name)] += [ids[content.int()], torch.tensor([END], dtype=torch.int16)]
    train, validation = torch.cat(splits[False]), torch.cat(splits[True])
    digest = hashlib.sha256(train.numpy().tobytes() + validation.numpy().tobytes()).hexdigest()[:16]
    return Text(train, validation, digest)


def batch(stream: Tensor, size: int, length: int, *, seed: int, step: int) -> Tensor:
    """Return (size, length + 1) int64 tokens: inputs without the last column, targets without the first column.

    The result depends only on the stream, the sizes, the seed and the step.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length, (size,), generator=generator)
    return stream[starts[:, None] + torch.arange(length + 1)].long()


def windows(stream: Tensor, count: int, length: int) -> Tensor:
    """Return (count, length + 1) int64: windows at equal distances over the stream, the same at each call."""
    starts = torch.linspace(0, len(stream) - length - 1, count).long()
    return stream[starts[:, None] + torch.arange(length + 1)].long()
