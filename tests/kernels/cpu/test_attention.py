"""The C++ op and the torch fallback against the float64 reference, over NaN memory, in every dtype and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from starling.attention_backends.kernels import reference
from starling.attention_backends.kernels.contract import Layout
from starling.attention_backends.kernels.cpu import fallback
from starling.attention_backends.kernels.cpu import paged_op as cpu
from tests.kernels.cases import Case, cases, one_row, rms

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module", autouse=True)
def op():
    """Without the op `cpu` would run the fallback, and these tests would not test the op."""
    assert cpu.built_op() is not None
    return cpu.built_op()


def check(case: Case, module=cpu) -> None:
    """out is exact to its dtype's rounding and lse to 1e-5; every cell is written, and no NaN reaches a result."""
    out, lse = case.run(module.paged_attention)
    exact, exact_lse = case.exact(reference.paged_attention)
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    assert not out[exact_lse.isinf()].any()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
    # Weights are rounded to the dtype once, and out once more. Neither moves an out further than its values reach. In
    # float32 the scores' rounding dominates; test_error_is_at_most_torchs bounds its RMS.
    reach = case.v_scale * 5
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=reach * max(torch.finfo(out.dtype).eps, 3e-6))


@given(cases(dtype=torch.float32))
@settings(max_examples=40, deadline=None)
def test_op_float32(case):
    check(case)


@given(cases(dtype=torch.bfloat16))
@settings(max_examples=40, deadline=None)
def test_op_bfloat16(case):
    check(case)


@given(cases(dtype=torch.float16))
@settings(max_examples=20, deadline=None)
def test_op_float16(case):
    check(case)


@given(cases(dtype=torch.bfloat16, cache_dtype=FP8[0], k_scale=0.5, v_scale=3.0))
@settings(max_examples=20, deadline=None)
def test_op_fp8_e4m3(case):
    check(case)


@given(cases(dtype=torch.float32, cache_dtype=FP8[1], k_scale=2.0, v_scale=0.25))
@settings(max_examples=20, deadline=None)
def test_op_fp8_e5m2(case):
    check(case)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_fallback(case):
    check(case, fallback)


@DTYPES
@pytest.mark.parametrize("cache_dtype", [None, *FP8], ids=str)
def test_fallback_dtypes(dtype, cache_dtype):
    check(one_row(5, 70, dtype=dtype, cache_dtype=cache_dtype, k_scale=0.5, v_scale=2.0), fallback)


LONG = {
    "decode": one_row(1, 3000, key_size=128, value_size=128, page_size=128, kv_heads=4),
    "decode of a group": one_row(1, 3000, key_size=64, value_size=64, page_size=32, group=8),
    "group of four, wide head": one_row(1, 1000, key_size=256, value_size=256, page_size=64, group=4),
    "extend": one_row(70, 1500, key_size=64, value_size=64, page_size=128, group=4),
    "many query tiles": one_row(400, 400, key_size=64, value_size=96, page_size=64),
    "window over pages": one_row(40, 1500, page_size=32, window=300, group=2),
    "batch": Case((1, 200, 0, 3, 1), (1200, 700, 90, 3, 1), key_size=64, value_size=64, page_size=32, group=3),
}


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_long_rows_on_one_thread_and_two(case, threads, dtype):
    """Tiles of 256 keys and 192 query rows. On two threads, a row's keys are split and the parts merged."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Case(**(vars(case) | {"dtype": dtype})))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_long_rows_of_the_fallback(case):
    check(case, fallback)


@DTYPES
@pytest.mark.parametrize("queries", [1, 4, 65])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["even scores", "uneven scores"])
def test_error_is_at_most_torchs(dtype, queries, size, spread):
    """The RMS error over four draws is at most 1.1 times that of torch's SDPA in the same dtype, plus a float32 ulp."""
    ours, theirs, norm = [], [], []
    for seed in range(4):
        case = one_row(
            queries, 700, key_size=size, value_size=size, page_size=32, kv_heads=4, group=2, dtype=dtype, seed=seed,
            spread=spread,
        )  # fmt: skip
        exact, _ = case.exact(reference.paged_attention)
        ours.append(case.run(cpu.paged_attention)[0].double() - exact)
        theirs.append(torch_attention(case).double() - exact)
        norm.append(exact)
    ulp = torch.finfo(torch.float32).eps * rms(torch.stack(norm))
    assert rms(torch.stack(ours)) <= 1.1 * rms(torch.stack(theirs)) + ulp


def torch_attention(case: Case) -> torch.Tensor:
    operands = case.operands()
    (queries,), (length,) = case.query_lens, case.seq_lens
    page_ids = operands.block_table[0, : -(-length // case.page_size)].long()
    key, value = (view[page_ids].flatten(0, 1)[:length].transpose(0, 1) for view in (operands.keys, operands.values))
    mask = reference.visible_mask(queries, length, causal=True, window=None)
    return torch.nn.functional.scaled_dot_product_attention(
        operands.query.transpose(0, 1)[None],
        key.repeat_interleave(case.group, 0)[None],
        value.repeat_interleave(case.group, 0)[None],
        attn_mask=mask,
        scale=operands.scale,
    )[0].transpose(0, 1)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
def test_visible_nan_reaches_the_result(name, threads, dtype):
    """A model that computes NaN must not get a finite result. Only NaN that no query sees has no effect."""
    case = one_row(1, 1500, kv_heads=1, page_size=32, dtype=dtype)
    tensor = case.tensors()[name].clone()
    view = tensor if name == "query" else tensor[case.tensors()["block_table"][0, 3].long()]
    view[..., 0, 0] = float("nan")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = case.run(cpu.paged_attention, **{name: tensor})
    finally:
        torch.set_num_threads(before)
    assert out.isnan().any()
    assert lse.isnan().all() or name == "value_cache"


def test_strided_operands():
    """A query that is a slice of a fused projection; an out and a cache with gaps between their rows."""
    case = Case((3, 1), (40, 17), group=2, layout=Layout.PAGES, page_size=16)
    tensors = case.tensors()
    fused = torch.full((4, 9, 96), float("nan"))
    fused[:, 2:6, 32:64] = tensors["query"]
    cache = torch.full((len(tensors["key_cache"]), 2, 16, 5, 32), float("nan"))
    cache[:, 0, :, 1:3], cache[:, 1, :, 2:4] = tensors["key_cache"], tensors["value_cache"]
    room = torch.zeros(4, 6, 64)
    changes = {
        "query": fused[:, 2:6, 32:64],
        "key_cache": cache[:, 0, :, 1:3],
        "value_cache": cache[:, 1, :, 2:4],
    }
    out, lse = cpu.paged_attention(case.operands(**changes, out=room[:, 1:5, 32:]))
    plain, plain_lse = case.run(cpu.paged_attention)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    room[:, 1:5, 32:] = 0
    assert not room.any()


REFUSED_VALUES = {
    "a page past the cache": (
        {"block_table": torch.full((1, 3), 99, dtype=torch.int32)},
        r"block_table\[0, 0\] = 99",
    ),
    "more keys than columns": ({"seq_lens": torch.tensor([49], dtype=torch.int32)}, r"seq_lens\[0\] = 49"),
    "a negative number of keys": ({"seq_lens": torch.tensor([-1], dtype=torch.int32)}, r"seq_lens\[0\] = -1"),
    "tokens of no row": (
        {"query_start_loc": torch.tensor([0, 1], dtype=torch.int32)},
        "from 0 to 1, not from 0 to the 2",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_VALUES.values(), ids=REFUSED_VALUES)
def test_values_that_lead_outside_of_the_operands(changes, message):
    case = one_row(2, 30)
    with pytest.raises(ValueError, match=message):
        case.run(cpu.paged_attention, **changes)


def test_unsupported_operands():
    for case, message in (
        (one_row(1, 9, dtype=torch.float64), "query of torch.float64: one of torch.float32"),
        (one_row(1, 9, key_size=40), "head sizes 40 and 32: multiples of 16"),
        (one_row(1, 9, page_size=8), "page of 8 tokens in layout cpu: a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            case.run(cpu.paged_attention)
    with pytest.raises(ValueError, match=r"out with strides .* must be contiguous"):
        cpu.paged_attention(one_row(1, 9).operands(out=torch.zeros(1, 2, 64)[..., ::2]))


def test_pages_of_any_size_in_the_page_layout():
    check(one_row(3, 61, page_size=7, layout=Layout.PAGES))
