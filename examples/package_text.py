"""Training text in which the context pays: Python sources of installed packages, whose names only the context tells.

Comments and the contents of strings are left out, and each window that a model sees has names of its own: `rename`
replaces each identifier of a window by NAME_TOKENS syllables, drawn at random for this window and the same throughout
it. So a model can learn Python's syntax from other texts, but how a name goes on after its first syllable from its
context only. Keywords, builtins and `self` keep their names.

The packages are pinned by `.ci/requirements-cpu.lock`, and validation has packages of its own. The files of a package
follow one another by path, and a file most of whose lines occurred before is left out. The text and so all figures
change with the versions of the packages; `Text.digest` identifies the text.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import keyword
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.random_llama import SPECIAL
from examples.stdlib_text import Text

TRAIN = ("sympy", "transformers", "matplotlib", "numba", "mypy", "fontTools", "hypothesis", "pip", "torch")
VALIDATION = ("networkx", "numpy", "huggingface_hub", "aiohttp", "rich", "pydantic")
EXCLUDED = {"_vendor", "test", "tests", "testing", "unicodedata"}
VOCABULARY, SYLLABLES, NAME_TOKENS = 576, 64, 3
"""Tokens in all, of which the last SYLLABLES are syllables; and the syllables of a name, each a token."""
CANDIDATES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiouy"]
"""Syllables, of which a tokenizer takes the first that are not pieces of other text."""
PACKAGE_BYTES, LONGEST = 2_500_000, 100_000
"""Bytes of the sources of a package; longer files, which are tables, are left out."""
NAME = re.compile(r"\b[^\W\d]\w*(?!['\w])")  # not the f of f''
KEPT = {*keyword.kwlist, *dir(builtins), "self"}
MARK = "\ue000"
"""Stands for a name while a text is encoded."""


def distinct_files(package: str, seen: set[int]) -> Iterator[bytes]:
    """Yield a package's sources by name, without files most of whose longer lines are in ``seen``, which grows."""
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
    """Read the files of the packages, of each package the first ``most`` bytes.

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


def without_strings(source: str) -> str | None:
    """Return the source without comments, docstrings and the contents of strings, or None if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            node.value = ""
    return ast.unparse(tree)


def names_in(text: str) -> list[str]:
    """Return the identifiers of a text, each occurrence."""
    return [name for name in NAME.findall(text) if name not in KEPT]


def marked(text: str) -> str:
    """Return the text with MARK for each identifier."""
    return NAME.sub(lambda match: match[0] if match[0] in KEPT else MARK, text)


def train_tokenizer(
    texts: list[str], vocabulary: int = VOCABULARY, syllables: int = SYLLABLES
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of what lies between names, with SPECIAL, the end of a file, as token 0.

    Its last ``syllables`` tokens are those of names.

    Raises:
        ValueError: there are too few syllables that are no pieces of other text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - syllables,
        special_tokens=[SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in marked(text).split(MARK)), trainer)
    pieces = tokenizer.get_vocab()
    free = [syllable for syllable in CANDIDATES if syllable not in pieces][:syllables]
    if len(free) < syllables:
        raise ValueError(f"{len(free)} syllables are no other tokens, and the tokenizer needs {syllables}")
    # As single words only, so that they are not found within the text between names.
    tokenizer.add_tokens([AddedToken(syllable, normalized=False, single_word=True) for syllable in free])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, names: dict[str, int]) -> Tensor:
    """Return one stream of int32 tokens: each text, and the token that ends it.

    Args:
        names: the number of each known identifier, which grows. Its token is the size of the vocabulary plus this
            number, for `rename` to spell.
    """
    parts = [marked(text).split(MARK) for text in texts]
    encodings = iter(tokenizer.backend_tokenizer.encode_batch([part for text in parts for part in text]))
    ids: list[int] = []
    for text, between in zip(texts, parts, strict=True):
        ids += next(encodings).ids
        for name, _ in zip(names_in(text), between[1:], strict=True):
            ids.append(len(tokenizer) + names.setdefault(name, len(names)))
            ids += next(encodings).ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def rename(tokens: Tensor, text: Text, seed: int) -> Tensor:
    """Spell the identifiers in each row of ``tokens`` (rows, T) in syllables, each in the same ones throughout a row.

    The syllables of a name are drawn independently. Rows keep their length: what the names push out is cut off.
    """
    vocabulary, generator = len(text.token_bytes), torch.Generator().manual_seed(seed)
    if not text.syllables:
        return tokens
    rows = []
    for row in tokens:
        is_name = row >= vocabulary
        distinct, number = row[is_name].unique(return_inverse=True)
        names = torch.randint(text.syllables, (len(distinct), NAME_TOKENS), generator=generator)
        repeats = torch.where(is_name, NAME_TOKENS, 1)
        spelled = row.repeat_interleave(repeats)
        spelled[is_name.repeat_interleave(repeats)] = (vocabulary - text.syllables + names[number].flatten()).to(
            row.dtype
        )
        rows.append(spelled[: len(row)])
    return torch.stack(rows)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return (vocabulary,) int64: bytes of text that each token stands for; the end of a file counts as one."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([1 if piece == SPECIAL else len(piece) for piece in pieces])


@functools.cache
def load_package_text() -> Text:
    """Read the text, train the tokenizer on a part of it, and encode; about a minute."""
    seen: set[int] = set()
    train, validation = (
        [text for source in read_packages(packages, seen, PACKAGE_BYTES) if (text := without_strings(source))]
        for packages in (TRAIN, VALIDATION)
    )
    tokenizer = train_tokenizer(train[::12])
    names: dict[str, int] = {}
    streams = encode(train, tokenizer, names), encode(validation, tokenizer, names)
    digest = hashlib.sha256(b"".join(stream.numpy().tobytes() for stream in streams)).hexdigest()[:16]
    return Text(*streams, digest, token_bytes(tokenizer), tokenizer, SYLLABLES)
