"""A recall task inside other text: a marked key with a value, and later the same key, after which the value is due.

`MARK key value ... MARK key value`: key and value are random tokens, so only the context tells the value. The distance
is from the first key to the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARK = "<|recall|>"
WIDTH = 3
"""Tokens of a planted item: MARK, key, value."""
DISTANCES = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Planted:
    """One pair of items: the token at ``position`` of ``row`` is the value to recall."""

    row: int
    position: int
    distance: int


def plant(tokens: Tensor, mark: int, vocabulary: int, distances: list[list[int]], seed: int) -> list[Planted]:
    """Overwrite parts of each row of (B, T) tokens with pairs of items, in place.

    Args:
        tokens: to write to.
        mark: the id of MARK.
        vocabulary: keys and values are ids from ``mark + 1`` to below this number.
        distances: of each row's pairs. A pair that finds no free place in some tries is left out.
        seed: of all random choices.
    """
    generator = torch.Generator().manual_seed(seed)
    planted = []
    for row, wanted in enumerate(distances):
        keys = mark + 1 + torch.randperm(vocabulary - mark - 1, generator=generator)[: len(wanted)]
        values = torch.randint(mark + 1, vocabulary, (len(wanted),), generator=generator)
        length, used = tokens.shape[1], set[int]()
        for key, value, distance in zip(keys.tolist(), values.tolist(), wanted, strict=True):
            starts = torch.randint(max(1, length - distance - WIDTH), (8,), generator=generator).tolist()
            for start in starts:
                places = {first + i for first in (start, start + distance) for i in range(WIDTH)}
                if max(places) < length and not places & used:
                    used |= places
                    for first in (start, start + distance):
                        tokens[row, first : first + WIDTH] = torch.tensor([mark, key, value])
                    planted.append(Planted(row, start + distance + WIDTH - 1, distance))
                    break
    return planted


def random_distances(rows: int, pairs: int, seed: int) -> list[list[int]]:
    """For each row the distances of its pairs, log-uniform over the range of DISTANCES."""
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log(DISTANCES[0]), math.log(DISTANCES[-1] + 1)
    return (low + (high - low) * torch.rand(rows, pairs, generator=generator)).exp().int().tolist()
