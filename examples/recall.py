"""The recall task: sequences of random tokens that repeat themselves, so that only the context tells the next token.

A sequence repeats a random segment of D tokens; D is the distance to look back. From the second copy on, a token is
predicted by finding the last occurrence of the current token and answering with the token behind it (induction).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DISTANCES = (32, 64, 128, 256, 512)


def repeated(distances: list[int], length: int, vocabulary: int, seed: int) -> Tensor:
    """(rows, length) int64: row i repeats ``distances[i]`` distinct random tokens of the vocabulary but its first."""
    generator = torch.Generator().manual_seed(seed)
    segments = [1 + torch.randperm(vocabulary - 1, generator=generator)[:distance] for distance in distances]
    return torch.stack([segment.repeat(-(-length // len(segment)))[:length] for segment in segments])


def random_distances(rows: int, length: int, seed: int) -> list[int]:
    """Log-uniform distances over the range of DISTANCES, at most half of ``length``."""
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log(DISTANCES[0]), math.log(min(DISTANCES[-1], length // 2) + 1)
    return (low + (high - low) * torch.rand(rows, generator=generator)).exp().int().tolist()
