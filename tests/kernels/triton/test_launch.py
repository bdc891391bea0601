"""The decisions of the Triton kernels on the host: tiles, splits, refusals. No kernel is launched."""

from __future__ import annotations

import pytest
import torch

from starling.attention_backends.kernels.contract import Operands, Sizes
from starling.attention_backends.kernels.triton import paged as triton_attention
from starling.attention_backends.kernels.triton.launch import check_dtypes, make_tile
from starling.attention_backends.kernels.triton.paged import MAX_SPLITS, MIN_KEYS_PER_SPLIT, is_decode, num_splits


def sizes(head_size: int, group: int) -> Sizes:
    return Sizes(rows=1, tokens=1, heads=group, kv_heads=1, key_size=head_size, value_size=head_size, page_size=16)


@pytest.mark.parametrize(
    ("head_size", "group", "element_bytes", "wanted", "lanes", "keys"),
    [
        (64, 1, 2, 128, 128, 64),
        (80, 4, 2, 128, 128, 32),
        (128, 8, 2, 16, 16, 32),
        (128, 7, 2, 128, 128, 32),
        (128, 24, 2, 16, 32, 32),
        (256, 2, 2, 128, 64, 16),
        (128, 4, 4, 128, 32, 16),
        (32, 1, 4, 16, 16, 32),
    ],
)
def test_tile(head_size: int, group: int, element_bytes: int, wanted: int, lanes: int, keys: int):
    tile = make_tile(sizes(head_size, group), element_bytes, wanted)
    assert (tile.lanes, tile.keys) == (lanes, keys)
    assert tile.queries(group) >= 1


def test_more_heads_than_fit_a_tile_are_refused():
    with pytest.raises(ValueError, match="128 query heads a KV head do not fit a tile of 64 lanes"):
        make_tile(sizes(256, 128), 2, 16)


@pytest.mark.parametrize(
    ("rows", "heads", "seq_len", "multiprocessors", "splits"),
    [
        (1, 8, 1_000_000, 132, 33),
        (1, 1, 1_000_000, 132, MAX_SPLITS),
        (1, 8, 1000, 132, 4),
        (64, 8, 100_000, 132, 1),
        (16, 4, 8192, 108, 4),
        (4, 8, 0, 132, 1),
        (0, 8, 100, 132, 1),
        (1, 1, 100_000, 1, 2),
    ],
)
def test_number_of_splits(rows: int, heads: int, seq_len: int, multiprocessors: int, splits: int):
    assert num_splits(rows, heads, seq_len, multiprocessors) == splits


def test_splits_are_long_and_no_more_than_needed():
    for rows in (1, 3, 50):
        for seq_len in (1, 255, 257, 5000, 10**6):
            splits = num_splits(rows, 8, seq_len, 132)
            assert splits == 1 or seq_len / (splits - 1) >= MIN_KEYS_PER_SPLIT
            assert splits == 1 or (splits - 1) * rows * 8 < 2 * 132


@pytest.mark.parametrize(
    ("tokens", "rows", "decode"), [(64, 64, True), (256, 64, True), (2048, 1, False), (9, 1, False), (0, 0, True)]
)
def test_a_batch_of_short_rows_is_decode(tokens: int, rows: int, decode: bool):
    assert is_decode(tokens, rows) == decode


def test_e4m3_is_refused_where_triton_can_not_convert_it():
    with pytest.raises(ValueError, match=r"fp8_e4m3 on compute capability \(8, 6\)"):
        check_dtypes(torch.bfloat16, torch.float8_e4m3fn, (8, 6))
    check_dtypes(torch.bfloat16, torch.float8_e4m3fn, (8, 9))
    check_dtypes(torch.bfloat16, torch.float8_e5m2, (8, 0))
    check_dtypes(torch.bfloat16, torch.float8_e4m3fn, None)


def test_float64_is_refused():
    query = torch.zeros(1, 1, 16, dtype=torch.float64)
    cache = torch.zeros(1, 16, 1, 16, dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.int32)
    operands = Operands(query, cache, cache, ones[None], torch.tensor([0, 1], dtype=torch.int32), ones, scale=1.0)
    with pytest.raises(ValueError, match=r"query is torch\.float64: the Triton kernels take"):
        triton_attention.prefill_attention(operands)
