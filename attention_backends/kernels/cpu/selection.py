"""Selection of the faster of two CPU ops for a batch.

It follows the measurements of benchmarks/kernels/cpu_kernels.py (results/cpu_kernels.json). Both ops read vLLM's CPU
layout. vLLM's op returns no log-sum-exp, so a caller that needs it takes Starling's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

CPU_ATTENTION_SETTINGS = ("auto", "vllm")
"""Values of the option ``cpu_attention``: the faster op of each batch, or always vLLM's."""


class Op(StrEnum):
    STARLING = "starling"
    VLLM = "vllm"


@dataclass(frozen=True)
class Processor:
    """The features of a processor that the selection depends on.

    Attributes:
        avx512: it has 512-bit vectors.
        bf16_dot: it multiplies pairs of bf16 in such vectors (AVX512-BF16).
    """

    avx512: bool
    bf16_dot: bool

    @classmethod
    def detect(cls) -> Processor:
        """Return the features of the processor that this process runs on."""
        return cls(torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported())


# Decode is bound by memory, which Starling's op reads in order. Where each KV head serves one query head, the op is
# faster for any number of keys; where it serves several, from this many keys on, as they no longer come from a cache.
MIN_KEYS_WITH_GROUP = 1024
# With more queries than this, both ops are bound by the same float multiplications, and their difference is noise.
MAX_QUERIES_IN_FLOAT = 64


def select_op(processor: Processor, dtype: torch.dtype, *, queries: int, keys: int, group: int) -> Op:
    """Select the faster op for a batch.

    Args:
        dtype: dtype of the query: float32, bfloat16 or float16.
        queries: maximum query tokens of a row of the batch.
        keys: maximum keys of a row of the batch.
        group: query heads per KV head.
    """
    if not processor.avx512:
        return Op.VLLM  # never measured on such a processor
    if dtype == torch.bfloat16 and processor.bf16_dot:
        return Op.STARLING
    few = queries <= MAX_QUERIES_IN_FLOAT and (keys >= MIN_KEYS_WITH_GROUP or queries == group == 1)
    return Op.STARLING if few else Op.VLLM
