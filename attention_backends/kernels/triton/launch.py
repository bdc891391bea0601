"""Chooses tile sizes and launches the Triton kernel."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from starling.attention_backends.kernels.contract import Operands, Sizes
from starling.attention_backends.kernels.triton.attend import LOG2E, paged_attention_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
E4M3_CAPABILITY = (8, 9)
# Bytes of a K tile, and the maximum of lanes, by bytes of an element. The products of float32 are computed outside of
# the tensor cores, from registers, of which smaller tiles need fewer (tests/kernels/triton/test_compile.py bounds
# spilling).
K_TILE_BYTES = {2: 8 * 1024, 4: 4 * 1024}
MAX_LANES = {2: 128, 4: 32}
Q_TILE_BYTES = 32 * 1024
STAGES = 5
"""Pipeline stages of the compiler, which divides them among page ids and the keys that they lead to. With five it has
room for two tiles of keys, and loads one while it computes the products of the other. With two to four it has room for
one."""

power_of_two = functools.cache(triton.next_power_of_2)
"""The power of two that a number is padded to. Triton's own takes 2 us a call, which each layer of a step makes."""


@dataclass(frozen=True)
class Tile:
    """The sizes of one program: lanes (queries x heads of one KV head), keys per step, warps, pipeline stages."""

    lanes: int
    keys: int
    warps: int
    stages: int = STAGES

    def queries(self, group: int) -> int:
        """Return the queries of a tile, for ``group`` query heads per KV head."""
        return self.lanes // group


def head_block(head_size: int) -> int:
    """Return the power of two, at least 16, that a head size is padded to in a tile."""
    return max(16, power_of_two(head_size))


def make_tile(sizes: Sizes, element_bytes: int, lanes: int) -> Tile:
    """Make a tile whose operands fit the shared memory of every card from compute capability 8.0 on.

    Two K and V tiles of 8 KB each, a Q tile of 32 KB and the compiler's moves between layouts are 64 to 83 KB. The
    smallest cards have 99 KB (CUDA programming guide, table of compute capabilities: 8.6, 8.9 and 12.0).

    Args:
        sizes: sizes of the call.
        element_bytes: bytes of an element of the query, in whose dtype the products are computed.
        lanes: wanted query lanes. The tile has more if one KV head serves more heads, fewer if so many do not fit.

    Raises:
        ValueError: the heads of one query do not fit a tile.
    """
    head_size = max(sizes.key_size, sizes.value_size)
    row_bytes = head_block(head_size) * element_bytes
    max_lanes = min(MAX_LANES[element_bytes], Q_TILE_BYTES // row_bytes)
    min_lanes = max(16, power_of_two(sizes.group))
    if min_lanes > max_lanes:
        raise ValueError(
            f"{sizes.group} query heads a KV head do not fit a tile of {max_lanes} lanes, all that head size "
            f"{head_size} leaves room for: use the reference"
        )
    lanes = max(min_lanes, min(lanes, max_lanes))
    keys = max(16, min(64, K_TILE_BYTES[element_bytes] // row_bytes))
    return Tile(lanes=lanes, keys=keys, warps=4 if lanes <= 16 else 8)


def check_dtypes(query: torch.dtype, cache: torch.dtype, capability: tuple[int, int] | None) -> None:
    """Refuse dtypes that the kernel, or a card of this compute capability, does not compute in.

    Args:
        query, cache: dtypes of the query and of both caches.
        capability: compute capability of the card; None without a card.

    Raises:
        ValueError: a dtype is not supported. The message names a supported one.
    """
    if query not in DTYPES:
        raise ValueError(f"query is {query}: the Triton kernels take {', '.join(map(str, DTYPES))}")
    if cache == torch.float8_e4m3fn and capability is not None and capability < E4M3_CAPABILITY:
        raise ValueError(
            f"fp8_e4m3 on compute capability {capability}: Triton converts it from {E4M3_CAPABILITY} on; use fp8_e5m2"
        )


def launch(operands: Operands, out: torch.Tensor, lse: torch.Tensor, lanes: int) -> None:
    """Fill ``out`` and ``lse``; each split attends to its part of each row's keys.

    Args:
        out: (splits, T, H, Dv). With more than one split, it is contiguous, and stays unwritten where ``lse`` is -inf.
        lse: (splits, T, H) float32, contiguous.
        lanes: wanted query lanes of a tile.

    Raises:
        ValueError: ``check_dtypes`` or ``make_tile`` refuses the operands, or they have ``row_heads``.
    """
    query, keys, values, sizes = operands.query, operands.keys, operands.values, operands.sizes
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    check_dtypes(query.dtype, keys.dtype, capability)
    if operands.row_heads is not None:
        raise ValueError("row_heads: each row of the Triton kernels computes all heads")
    tile = make_tile(sizes, query.element_size(), lanes)
    if not sizes.tokens or not sizes.rows:
        return
    splits, softcap = len(out), operands.softcap
    dot_scale = operands.scale * operands.k_scale
    # `find_row` needs up to one more tile for each row.
    grid = (sizes.tokens // tile.queries(sizes.group) + sizes.rows, sizes.kv_heads, splits)
    paged_attention_kernel[grid](
        query,
        keys,
        values,
        out,
        lse,
        operands.block_table,
        operands.query_start_loc,
        operands.seq_lens,
        dot_scale / softcap if softcap else dot_scale * LOG2E.value,
        softcap * LOG2E.value,
        operands.v_scale,
        operands.window or 0,
        sizes.rows,
        sizes.tokens,
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        *out.stride()[1:],
        *lse.stride()[1:],
        operands.block_table.stride(0),
        GROUP=sizes.group,
        PAGE_SIZE=sizes.page_size,
        HEAD_SIZE=sizes.key_size,
        HEAD_SIZE_V=sizes.value_size,
        BLOCK_M=tile.lanes,
        BLOCK_N=tile.keys,
        BLOCK_D=head_block(sizes.key_size),
        BLOCK_DV=head_block(sizes.value_size),
        CAUSAL=operands.causal,
        QUERIES_PER_KEY=operands.queries_per_key,
        WINDOWED=operands.window is not None,
        CAPPED=softcap != 0,
        PARTIAL=splits > 1,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
