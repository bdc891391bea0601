"""Training text from the Python sources of installed packages, with a tokenizer trained on it.

The packages are pinned by `.ci/requirements-cpu.lock`. Validation has packages of its own, so that their names are new
and a model gains by looking for them in its context. The files of a package follow one another by name, and a file most
of whose lines occurred before is left out. The text and so all figures change with the versions of the packages;
`Text.digest` identifies the text.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.random_llama import SPECIAL
from examples.stdlib_text import Text

TRAIN = ("sympy", "transformers", "matplotlib", "numba", "mypy", "fontTools", "hypothesis", "pip", "torch")
VALIDATION = ("networkx", "numpy", "huggingface_hub", "aiohttp", "rich", "pydantic")
EXCLUDED = {"_vendor", "test", "tests", "testing", "unicodedata"}
VOCABULARY = 2048
TRAIN_BYTES, LONGEST = 40_000_000, 100_000
"""Bytes of training text, of equal shares a package; longer files, which are tables, are left out."""


def distinct_files(package: str, seen: set[int]) -> Iterator[bytes]:
    """The sources of a package by name, without the files most of whose longer lines are in ``seen``, which grows."""
    root = Path(sysconfig.get_paths()["purelib"]) / package
    for path in sorted(root.rglob("*.py"), key=Path.as_posix):
        if EXCLUDED & set(path.relative_to(root).parts) or not 200 <= path.stat().st_size <= LONGEST:
            continue
        content = path.read_bytes()
        lines = [hash_of(line) for line in content.split(b"\n") if len(line.strip()) > 20]
        if sum(line in seen for line in lines) < len(lines) / 2:
            yield content
        seen.update(lines)


def hash_of(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line.strip(), digest_size=8).digest())


def read_packages(packages: tuple[str, ...], seen: set[int], most: int | None = None) -> list[str]:
    """The files of the packages, of each package the first ``most`` bytes.

    Raises:
        FileNotFoundError: a package is not installed.
    """
    texts = []
    for package in packages:
        found, size = [], 0
        for content in distinct_files(package, seen):
            found.append(content.decode(errors="replace"))
            size += len(content)
            if most is not None and size > most:
                break
        if not found:
            raise FileNotFoundError(f"the text needs the package {package}, which is not installed")
        texts += found
    return texts


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, with the special token SPECIAL, the end of a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """One stream of int16 tokens: each text, and the token that ends it."""
    ids = [
        torch.tensor([*one.ids, tokenizer.eos_token_id], dtype=torch.int16)
        for first in range(0, len(texts), 64)
        for one in tokenizer.backend_tokenizer.encode_batch(texts[first : first + 64])
    ]
    return torch.cat(ids)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(vocabulary,) int64: bytes of text that each token stands for; the end of a file counts as one."""
    special = set(tokenizer.all_special_tokens)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([1 if piece in special else len(piece) for piece in pieces])


@functools.cache
def load_package_text() -> Text:
    """Read the text, train the tokenizer on a twelfth of its files, and encode; about a minute."""
    seen: set[int] = set()
    train = read_packages(TRAIN, seen, TRAIN_BYTES // len(TRAIN))
    validation = read_packages(VALIDATION, seen)
    tokenizer = train_tokenizer(train[::12])
    streams = encode(train, tokenizer), encode(validation, tokenizer)
    digest = hashlib.sha256(b"".join(stream.numpy().tobytes() for stream in streams)).hexdigest()[:16]
    return Text(*streams, digest, token_bytes(tokenizer), tokenizer)
