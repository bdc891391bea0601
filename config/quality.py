"""Sizes that the words of `star_quality` stand for on a server, where its model's losses were measured."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from starling.config.parsing import OptionError, meant, read_word, shown, words_of
from starling.config.star import Quality

WORDS = tuple(words_of(Quality))
DENSE = "dense"

SIZE = re.compile(r"n/([2-9]|[1-9][0-9]{1,3})")
ALLOWED = (
    f"fast=n/16,balanced=n/8,careful={DENSE}, say: for each word a share of the prompt, or {DENSE}, and no smaller "
    "share for a more careful word"
)


def parse_quality_sizes(value: Any, name: str) -> dict[str, int]:
    """Return word -> the number of equal star blocks of a prompt; 1 is dense.

    Args:
        value: ``{"fast": "n/16", "balanced": "n/8", "careful": "dense"}``, or the same as a text of WORD=SIZE with
            commas between them.
        name: name of the option, for messages.

    Raises:
        OptionError: a word is missing, unknown or given twice; a size is none; a more careful word has smaller blocks.
    """

    def refused(reason: str) -> OptionError:
        return OptionError(name, value, reason, ALLOWED)

    if not isinstance(value, (str, Mapping)):
        raise refused("it must be an object, or words and sizes")
    sizes: dict[str, int] = {}
    for name_of_word, size in _pairs(value) if isinstance(value, str) else value.items():
        word = read_word(name_of_word)
        if word not in WORDS:
            raise refused(f"there is no such quality as {shown(name_of_word)}{meant(str(word), WORDS)}")
        if word in sizes:
            raise refused(f"{word} is given twice")
        text = read_word(size).replace(" ", "") if isinstance(size, str) else ""
        found = SIZE.fullmatch(text)
        if found is None and text != DENSE:
            raise refused(f"{shown(size)} is no size")
        sizes[word] = 1 if found is None else int(found[1])
    missing = [word for word in WORDS if word not in sizes]
    if missing:
        raise refused(f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no size")
    for word, more_careful in pairwise(WORDS):
        if sizes[more_careful] > sizes[word]:
            raise refused(f"{more_careful} would have smaller star blocks than {word}")
    return {word: sizes[word] for word in WORDS}


def size_text(num_blocks: int) -> str:
    """Return a size as text: ``n/8`` of 8, ``dense`` of 1."""
    return f"n/{num_blocks}" if num_blocks > 1 else DENSE


def size_texts(sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the sizes as a server's options give them."""
    return {word: size_text(number) for word, number in sizes.items()}


def _pairs(text: str) -> list[tuple[str, Any]]:
    """Return the words and sizes of a text.

    The text is WORD=SIZE with commas, or an object of JSON, which vLLM makes of one in YAML.
    """
    if text.lstrip().startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            return list(json.loads(text).items())
    pairs = (part.partition("=") for part in text.split(","))
    return [(word.strip(), size.strip()) for word, _, size in pairs]
