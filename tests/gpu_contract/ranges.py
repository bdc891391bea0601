"""Starling's kernel of tokens over ranges of keys (kernels/ranges.py), token by token in torch."""

from __future__ import annotations

import torch

from starling.attention_backends.kernels.contract import Rotation, rotate_back
from starling.attention_backends.kernels.ranges import PLACE_FIELDS, RANGE_FIELDS, RangeTable


def attend_in_ranges(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    table: RangeTable,
    rotation: Rotation,
    out: torch.Tensor,
    *,
    scale: float,
    softcap: float,
) -> None:
    """As ``attend_ranges`` of kernels/triton/ranges.py, without a softcap."""
    assert not softcap
    numbers, (places_at, ranges_at) = table.numbers.tolist(), table.offsets
    for place in range(numbers[0]):
        at = places_at + PLACE_FIELDS * place
        row, behind, _, first_range, stop_range = numbers[at : at + PLACE_FIELDS]
        ranges = []
        for number in range(first_range, stop_range):
            at = ranges_at + RANGE_FIELDS * number
            ranges.append(numbers[at : at + 3])
        for index in range(min(table.tile_queries, behind)):
            token, end = int(table.query_start_loc[row + 1]) - behind + index, int(table.seq_lens[row]) - behind + index
            out[token] = _attend(query[token], caches, table.block_table[row], ranges, end + 1, rotation, scale)


def _attend(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    ranges: list[list[int]],
    end: int,
    rotation: Rotation,
    scale: float,
) -> torch.Tensor:
    """(H, Dv): the attention of one token over the keys below ``end``."""
    page_size, group, scores, values = caches[0].shape[1], len(query) // caches[0].shape[2], [], []
    for first, stop, rotate_by in ranges:
        position = torch.arange(first, min(stop, end))
        key, value = (cache[pages[position // page_size].long(), position % page_size] for cache in caches)
        rerotated = rotate_back(
            query[None], rotation.cos[rotate_by, None], rotation.sin[rotate_by, None], rotation.is_neox_style
        )[0]
        scores.append(torch.einsum("hd,khd->hk", rerotated, key.repeat_interleave(group, 1)) * scale)
        values.append(value.repeat_interleave(group, 1))
    return torch.einsum("hk,khd->hd", torch.cat(scores, 1).softmax(1), torch.cat(values))
