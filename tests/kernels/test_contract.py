"""Layouts, page views, visible keys, and the validation of operands."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops

from starling.attention_backends.kernels.contract import CPU_ISAS, Layout, Sizes, as_fp8, page_views, visible_keys
from starling.attention_backends.kernels.reference import visible_mask
from tests.kernels.cases import Case


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_views_of_what_vllm_stores(isa, dtype, page_size):
    """The views show each key and value in the slot that vLLM's op wrote it to."""
    size, heads = 64, 2
    cache = torch.zeros(5, heads, 2 * page_size, size, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    key, value = torch.randn(2, page_size, heads, size).to(dtype)
    slots = torch.randperm(5 * page_size)[:page_size]
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    keys, values = page_views(key_cache, value_cache, Layout.CPU)
    assert torch.equal(keys[slots // page_size, slots % page_size], key)
    assert torch.equal(values[slots // page_size, slots % page_size], value)
    assert keys.data_ptr() == cache.data_ptr()


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 cache on a CPU needs AVX-512")
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_views_of_an_fp8_cache(kv_cache_dtype):
    page_size, size = 32, 64
    cache = torch.zeros(2, 1, 2 * page_size, size, dtype=torch.uint8)
    key_cache, value_cache = cache.chunk(2, dim=2)
    key, value = (torch.randint(-8, 9, (2, page_size, 1, size)) / 4).bfloat16()  # exact in both formats, scaled or not
    ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, torch.arange(page_size) + page_size, "vec", 0.5, 0.25, kv_cache_dtype
    )
    caches = (as_fp8(tensor, kv_cache_dtype) for tensor in (key_cache, value_cache))
    keys, values = page_views(*caches, Layout.CPU)
    assert torch.equal(keys[1].float() * 0.5, key.float())
    assert torch.equal(values[1].float() * 0.25, value.float())


def test_other_quantised_caches_are_refused():
    with pytest.raises(ValueError, match="'int8' is not one of fp8, fp8_e4m3, fp8_e5m2"):
        as_fp8(torch.zeros(1, dtype=torch.uint8), "int8")


def test_a_key_cache_in_parts_is_refused():
    cache = torch.zeros(2, 1, 64, 32)[:, :, ::2]
    with pytest.raises(ValueError, match="needs whole pages a head"):
        page_views(cache, cache, Layout.CPU)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_key", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_visible_keys_are_those_of_the_mask(causal, per_key, window):
    for queries, keys in ((1, 7), (4, 4), (5, 9), (6, 2), (3, 0)):
        rule = {"causal": causal, "queries_per_key": per_key, "window": window}
        mask = visible_mask(queries, keys, **rule)
        for query in range(queries):
            first, end = visible_keys(query, queries, keys, **rule)
            assert mask[query].nonzero().flatten().tolist() == list(range(first, end))


def test_staircase_of_two_queries_per_key():
    steps = visible_mask(5, 7, causal=True, queries_per_key=2, window=None).sum(1)
    assert steps.tolist() == [5, 6, 6, 7, 7]


CASE = Case((2, 1), (20, 5), kv_heads=2, group=2)
REFUSED = {
    "a query of two dimensions": ({"query": torch.zeros(3, 32)}, "query of shape"),
    "int64 lengths": ({"seq_lens": torch.tensor([20, 5])}, "seq_lens is torch.int64, not torch.int32"),
    "heads that do not divide": ({"query": torch.zeros(3, 3, 32)}, "3 query heads are no multiple of 2"),
    "a row too many": ({"seq_lens": torch.ones(3, dtype=torch.int32)}, "3 rows in seq_lens, 2 in block_table"),
    "another head size": ({"query": torch.zeros(3, 4, 64)}, "do not fit each other and head size 64"),
    "another dtype": ({"query": torch.zeros(3, 4, 32).half()}, "both in query's torch.float16"),
    "no query to a key": ({"queries_per_key": 0}, "queries_per_key=0: at least 1"),
    "no window": ({"window": 0}, "window=0: at least 1"),
    "a negative cap": ({"softcap": -1.0}, "softcap=-1.0"),
    "a wrong out": ({"out": torch.zeros(3, 4, 64)}, "query and values need"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_operands_outside_the_contract(changes, message):
    with pytest.raises(ValueError, match=message):
        CASE.operands(**changes)


def test_operands_of_the_contract():
    operands = CASE.operands()
    assert operands.sizes == Sizes(rows=2, tokens=3, heads=4, kv_heads=2, key_size=32, value_size=32, page_size=16)
    assert operands.sizes.group == 2
    assert operands.keys.shape[1:] == operands.values.shape[1:] == (16, 2, 32)
    assert operands.make_out().shape == (3, 4, 32)
    assert operands.make_lse().dtype == torch.float32


def test_operands_are_checked_without_their_values():
    """A CUDA graph can't capture a read of values, which tensors of the device "meta" do not have."""
    CASE.operands(**{name: tensor.to("meta") for name, tensor in CASE.tensors().items()})


@pytest.mark.parametrize(("dtype", "lse"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_dtypes_of_new_results(dtype, lse):
    operands = Case((2, 1), (20, 5), dtype=dtype).operands()
    assert operands.make_out().dtype == dtype
    assert operands.make_lse().dtype == lse
