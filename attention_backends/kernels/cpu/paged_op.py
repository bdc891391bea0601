"""Paged attention on a CPU: the C++ op of attention.cpp, or plain torch (fallback.py) where the op can't be built."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from starling.attention_backends.kernels.contract import Layout, Operands, Rotation
from starling.attention_backends.kernels.cpu import fallback
from starling.attention_backends.kernels.cpu.build import BuildError, load_op

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR_SIZE = 16
"""Elements of the op's vectors (LANES of vector.h): head sizes, and page sizes of layout CPU, are multiples of it."""


@functools.cache
def built_op() -> Any | None:
    """Return the C++ ops, or None if they can't be built or loaded. The reason is logged once."""
    try:
        return load_op()
    except BuildError as error:
        logger.warning("%s. Attention runs in plain torch, which is slower.", error)
        return None


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py.

    Raises:
        ValueError: ``refusal`` returns a reason; or, from the op alone, ``query_start_loc``, ``seq_lens`` or
            ``block_table`` holds values that lead outside of the other operands.
    """
    reason = refusal(operands)
    if reason is not None:
        raise ValueError(reason)
    ops = built_op()
    if ops is None:
        return fallback.paged_attention(operands)
    out = operands.make_out()
    lse = ops.paged_attention(
        *tensors_of(operands),
        operands.row_heads,
        out,
        operands.scale * operands.k_scale,
        operands.causal,
        operands.queries_per_key,
        operands.window or 0,
        operands.softcap,
        operands.v_scale,
        operands.layout is Layout.CPU,
    )
    return out, lse


def has_op_for(operands: Operands) -> bool:
    """Return whether ``rerotated_attention`` can run the operands; else ``paged_attention`` and torch compute them."""
    return operands.query.device.type == "cpu" and refusal(operands) is None and built_op() is not None


def rerotated_attention(
    operands: Operands,
    tokens: torch.Tensor,
    rotate_by: torch.Tensor,
    rotation: Rotation,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Compute the attention that dispatch.py defines, by the C++ op.

    Args:
        operands: operands for which ``has_op_for`` is true.
        out: (T, H, Dv) to write to; float32 with ``lse``, else in the query's dtype.
        lse: (T, H) float32, contiguous, of the attention to other keys in ``out``, or None if ``out`` has none.

    Raises:
        ValueError: ``query_start_loc``, ``seq_lens``, ``block_table``, ``tokens`` or ``rotate_by`` holds values that
            lead outside of the other operands.
    """
    ops = built_op()
    assert ops is not None
    ops.rerotated_attention(
        *tensors_of(operands),
        tokens,
        rotate_by,
        rotation.cos,
        rotation.sin,
        rotation.is_neox_style,
        out,
        lse,
        operands.scale * operands.k_scale,
        operands.softcap,
        operands.v_scale,
        operands.layout is Layout.CPU,
    )


def tensors_of(operands: Operands) -> tuple[torch.Tensor, ...]:
    """Return the first arguments of both ops."""
    tables = (operands.block_table, operands.query_start_loc, operands.seq_lens)
    return operands.query, operands.keys, operands.values, *(table.contiguous() for table in tables)


def refusal(operands: Operands) -> str | None:
    """Return the reason why the op does not support the operands, or None if it does."""
    query, sizes, layout = operands.query, operands.sizes, operands.layout
    if query.device.type != "cpu":
        return f"query on {query.device}: this op is for cpu tensors"
    if query.dtype not in DTYPES:
        return f"query of {query.dtype}: one of {', '.join(map(str, DTYPES))}"
    if sizes.key_size % VECTOR_SIZE or sizes.value_size % VECTOR_SIZE:
        return f"head sizes {sizes.key_size} and {sizes.value_size}: multiples of {VECTOR_SIZE}"
    if layout is Layout.CPU and sizes.page_size % VECTOR_SIZE:
        return f"page of {sizes.page_size} tokens in layout {layout.value}: a multiple of {VECTOR_SIZE}"
    key_dim = 1 if layout is Layout.CPU else 3
    contiguous = (("query", query, 2), ("values", operands.values, 3), ("keys", operands.keys, key_dim))
    for name, tensor, dim in (*contiguous, ("out", operands.out, 2)):
        if tensor is not None and tensor.stride(dim) != 1:
            return f"{name} with strides {tensor.stride()}: the innermost dimension must be contiguous"
    return None


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
