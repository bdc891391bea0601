"""Texts that several prompts have: what documents would take from the cache, wherever they stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RUN = 32
"""Tokens that a text has at least: a page of the presets whose prompts have documents."""
BASE = 0x9E3779B97F4A7C15  # odd: its powers have inverses
INVERSE = pow(BASE, -1, 1 << 64)
Hashes = npt.NDArray[np.uint64]


def repeated_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens of prompts that stand in a text, of RUN tokens or more, that an earlier prompt has too.

    Without the tokens of the beginning that an earlier prompt has too: vLLM's prefix cache finds those.
    """
    if not prompts:
        return 0
    prefixes = [prefix_hashes(np.asarray(prompt, dtype=np.uint64)) for prompt in prompts]
    runs = [run_hashes(prefix) for prefix in prefixes]
    found = 0
    for begin, starts in zip(seen_before([prefix[1:] for prefix in prefixes]), seen_before(runs), strict=True):
        num_common = len(begin) if begin.all() else int(begin.argmin())
        changes = np.zeros(len(begin) + 1, dtype=np.int64)
        changes[: len(starts)] += starts
        changes[RUN : RUN + len(starts)] -= starts
        found += int(np.count_nonzero(changes.cumsum()[num_common : len(begin)]))
    return found


def prefix_hashes(tokens: Hashes) -> Hashes:
    """Return (n + 1,) the hash of each beginning of n tokens: a polynomial in BASE, modulo 2^64."""
    powers = np.full(len(tokens), BASE, dtype=np.uint64)
    powers[:1] = 1
    terms = (tokens + np.uint64(1)) * np.multiply.accumulate(powers)
    return np.concatenate([np.zeros(1, dtype=np.uint64), np.add.accumulate(terms, dtype=np.uint64)])


def run_hashes(prefix: Hashes) -> Hashes:
    """Return (n - RUN + 1,) the hash of each RUN tokens, wherever they stand."""
    sums = prefix[RUN:] - prefix[:-RUN]
    powers = np.full(len(sums), INVERSE, dtype=np.uint64)
    powers[:1] = 1
    return sums * np.multiply.accumulate(powers)


def seen_before(hashes: Sequence[Hashes]) -> list[npt.NDArray[np.bool_]]:
    """Return, for each hash of each prompt, whether an earlier prompt has it."""
    owners = np.repeat(np.arange(len(hashes)), [len(each) for each in hashes])
    _, first, which = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    seen = owners[first][which] < owners
    return np.split(seen, np.cumsum([len(each) for each in hashes])[:-1])
