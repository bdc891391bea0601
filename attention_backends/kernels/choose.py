"""Which of the two CPU ops a step is faster on, by what benchmarks/cpu_kernels.py measured (results/cpu_kernels.json).

Both read vLLM's CPU layout. vLLM's op has no log-sum-exp, so whoever needs one has no choice to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

SETTINGS = ("auto", "vllm")  # of the option cpu_attention: the faster op, or vLLM's always


class Op(StrEnum):
    STARLING = "starling"
    VLLM = "vllm"


@dataclass(frozen=True)
class Processor:
    """What decides on a processor: 512-bit vectors, and dot products of bf16 pairs in them."""

    avx512: bool
    bf16_dot: bool

    @classmethod
    def here(cls) -> Processor:
        return cls(torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported())


# Decode waits for memory, which this op asks for in order: it gains from the first keys on where each KV head serves
# one query head, and past this many keys, when they no longer come from a cache, where it serves several.
KEYS_FOR_A_GROUP = 1024
# Beyond this many queries both ops are bound by the same float multiplications, and which is ahead is noise.
QUERIES_FOR_FLOATS = 64


def choose(processor: Processor, dtype: torch.dtype, *, queries: int, keys: int, group: int) -> Op:
    """The faster op for a batch.

    Args:
        dtype: query's, float32, bfloat16 or float16.
        queries: of its row with the most; ``keys``: of its row with the most.
        group: query heads of a KV head.
    """
    if not processor.avx512:
        return Op.VLLM  # never measured here
    if dtype == torch.bfloat16 and processor.bf16_dot:
        return Op.STARLING
    few = queries <= QUERIES_FOR_FLOATS and (keys >= KEYS_FOR_A_GROUP or queries == group == 1)
    return Op.STARLING if few else Op.VLLM
