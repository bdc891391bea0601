"""Tile sizes, and the call of the Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from attention_backends.kernels.contract import Layout, Sizes, page_views
from attention_backends.kernels.triton_attend import LOG2E, paged_attention_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
E4M3_CAPABILITY = (8, 9)
# Bytes of a K tile, and most lanes, by bytes of an element. The products of float32 are taken outside of the tensor
# cores, from registers, of which smaller tiles need fewer (tests/kernels/test_triton_compile.py sees spilling).
K_TILE_BYTES = {2: 16 * 1024, 4: 8 * 1024}
MOST_LANES = {2: 128, 4: 32}
Q_TILE_BYTES = 32 * 1024


@dataclass(frozen=True)
class Tile:
    """How one program is cut: lanes (queries times heads of a KV head), keys a step, warps, pipeline stages."""

    lanes: int
    keys: int
    warps: int
    stages: int = 2

    def queries(self, group: int) -> int:
        """Queries of a tile, for ``group`` query heads a KV head."""
        return self.lanes // group


def head_block(head_size: int) -> int:
    """The power of two, 16 at least, that a head size is padded to in a tile."""
    return max(16, triton.next_power_of_2(head_size))


def make_tile(sizes: Sizes, element_bytes: int, lanes: int) -> Tile:
    """A tile whose operands fit the shared memory of every card from compute capability 8.0 on.

    K and V tiles of 16 KB in two stages and a Q tile of 32 KB are 96 KB; the smallest cards have 99 KB
    (CUDA programming guide, table of compute capabilities: 8.6, 8.9 and 12.0). Triton adds next to nothing.

    Args:
        element_bytes: of the query's dtype, in which the products are taken.
        lanes: query lanes wanted; more where a KV head serves more heads, fewer where they would not fit.

    Raises:
        ValueError: one query's heads do not fit a tile.
    """
    padded, group = head_block(max(sizes.key_size, sizes.value_size)), sizes.heads // sizes.kv_heads
    row_bytes = padded * element_bytes
    most = min(MOST_LANES[element_bytes], Q_TILE_BYTES // row_bytes)
    least = max(16, triton.next_power_of_2(group))
    if least > most:
        raise ValueError(
            f"{group} query heads a KV head do not fit a tile of {most} lanes, all that head size "
            f"{max(sizes.key_size, sizes.value_size)} leaves room for: use the reference"
        )
    lanes = max(least, min(lanes, most))
    keys = max(16, min(64, K_TILE_BYTES[element_bytes] // row_bytes))
    return Tile(lanes=lanes, keys=keys, warps=4 if lanes <= 16 else 8)


def check_dtypes(query: torch.dtype, cache: torch.dtype, capability: tuple[int, int] | None) -> None:
    """Refuse what the kernel, or a card of this compute capability, does not compute in.

    Raises:
        ValueError: with what to use instead.
    """
    if query not in DTYPES:
        raise ValueError(f"query is {query}: the Triton kernels take {', '.join(map(str, DTYPES))}")
    if cache == torch.float8_e4m3fn and capability is not None and capability < E4M3_CAPABILITY:
        raise ValueError(
            f"fp8_e4m3 on compute capability {capability}: Triton converts it from {E4M3_CAPABILITY} on; use fp8_e5m2"
        )


def prepare(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both caches as (pages, page, KV heads, head size), whatever the strides, after ``check_dtypes``."""
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    check_dtypes(query.dtype, key_cache.dtype, capability)
    return page_views(key_cache, value_cache, layout)


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    tile: Tile,
    scale: float,
    causal: bool,
    queries_per_key: int,
    window: int | None,
    softcap: float,
    k_scale: float,
    v_scale: float,
) -> None:
    """Fill ``out`` (splits, T, H, Dv) and ``lse`` (splits, T, H), each split with its share of each row's keys.

    With more than one split, ``out`` is left as it was where ``lse`` is -inf. ``keys`` and ``values`` are those of
    ``prepare``; the other arguments are the contract's.
    """
    splits, tokens, heads, _ = out.shape
    kv_heads, rows = keys.shape[2], seq_lens.shape[0]
    group = heads // kv_heads
    if not tokens or not rows:
        return
    dot_scale = scale * k_scale
    # ``tile.queries`` divides the lanes among a row's queries; see ``find_row`` for the number of tiles.
    grid = (tokens // tile.queries(group) + rows, kv_heads, splits)
    paged_attention_kernel[grid](
        query,
        keys,
        values,
        out,
        lse,
        block_table,
        query_start_loc,
        seq_lens,
        dot_scale / softcap if softcap else dot_scale * LOG2E.value,
        softcap * LOG2E.value,
        v_scale,
        window or 0,
        rows,
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        *out.stride(),
        *lse.stride(),
        block_table.stride(0),
        GROUP=group,
        PAGE=keys.shape[1],
        HEAD_SIZE=query.shape[2],
        HEAD_SIZE_V=values.shape[3],
        BLOCK_M=tile.lanes,
        BLOCK_N=tile.keys,
        BLOCK_D=head_block(query.shape[2]),
        BLOCK_DV=head_block(values.shape[3]),
        CAUSAL=causal,
        QUERIES_PER_KEY=queries_per_key,
        WINDOWED=window is not None,
        CAPPED=softcap != 0,
        PARTIAL=splits > 1,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
