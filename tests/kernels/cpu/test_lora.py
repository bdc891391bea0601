"""LoRA's rows on a CPU, against a product for each row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers.utils import LoRAMapping, LoRAMappingType
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.import_utils import resolve_obj_by_qualname

from starling.attention_backends.kernels.cpu.lora_op import OwnLoRA, use_own_lora
from starling.attention_backends.kernels.cpu.paged_op import built_op
from starling.vllm_compat.cpu_lora import MaskedLoRA
from starling.vllm_compat.versions import vllm_version

ROWS, SIZE, RANK, SLICES, SLOTS = 12, 16, 4, (8, 24), 3
KINDS = (MaskedLoRA, OwnLoRA)
IDS = [5, None, 9]
"""The adapter of each slot."""
MIXED = (5, 5, 0, 0, 9, 5, 0, 9, 9, 0, 0, 5)


@pytest.fixture(scope="module", autouse=True)
def op():
    """The op is built, and known to torch.compile."""
    assert built_op() is not None
    before = vars(CpuPlatform)["get_punica_wrapper"]
    use_own_lora()
    assert resolve_obj_by_qualname(CpuPlatform.get_punica_wrapper()) is OwnLoRA
    CpuPlatform.get_punica_wrapper = before


def wrapped(kind: type, mapping: tuple[int, ...], is_prefill: bool):
    made = kind(64, 8, device="cpu")
    of_batch = LoRAMapping(mapping, (0,), is_prefill=is_prefill, type=LoRAMappingType.LANGUAGE)
    made.update_metadata(of_batch, IDS, SLOTS, 100)
    return made


def weights(dtype: torch.dtype):
    """(A, B) of each slice: (slots, 1, rank, in) and (slots, 1, out, rank). The last slot has an adapter."""
    first = tuple(torch.randn(SLOTS, 1, RANK, SIZE, dtype=dtype) for _ in SLICES)
    return first, tuple(torch.randn(SLOTS, 1, size, RANK, dtype=dtype) for size in SLICES)


def expected(x, y, first, second, mapping, scale):
    found = y.double().clone()
    for row, number in enumerate(mapping):
        if number:
            start, slot = 0, IDS.index(number)
            for a, b, size in zip(first, second, SLICES, strict=True):
                low = scale * (a[slot, 0].double() @ x[row].double())
                found[row, start : start + size] += b[slot, 0].double() @ low
                start += size
    return found


def gap(found, right) -> float:
    """How far a matrix is from float64's."""
    return float((found.double() - right).norm())


def in_torch(x, y, first, second, mapping, scale):
    """Plain products in the dtype of the rows."""
    found = y.clone()
    for row, number in enumerate(mapping):
        if number:
            start, slot = 0, IDS.index(number)
            for a, b, size in zip(first, second, SLICES, strict=True):
                low = scale * (a[slot, 0].to(x.dtype) @ x[row])
                found[row, start : start + size] += b[slot, 0].to(x.dtype) @ low
                start += size
    return found


def linear(made, x, y, first, second, scale):
    made.add_lora_linear(y, x, first, second, scale, SLICES)


def in_two_steps(made, x, y, first, second, scale):
    """As layers with fully sharded adapters call it."""
    buffers = torch.empty(len(SLICES), len(x), RANK)
    made.add_shrink(buffers, x, first, scale)
    made.add_expand(y, buffers, second, SLICES, add_inputs=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [linear, in_two_steps])
@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize("mapping", [MIXED, (5,) * ROWS, (0,) * ROWS, (9,)], ids=["mixed", "one", "none", "one row"])
def test_rows_have_their_own_adapter_or_none(kind, steps, is_prefill, mapping):
    first, second = weights(torch.float32)
    x, y = torch.randn(len(mapping), SIZE), torch.randn(len(mapping), sum(SLICES))
    right = expected(x, y, first, second, mapping, 0.5)
    steps(wrapped(kind, mapping, is_prefill), x, y, first, second, 0.5)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [2, ROWS], ids=["few", "many"])
@pytest.mark.parametrize("ours", KINDS)
def test_bfloat16_is_no_further_from_float64_than_vllms(ours, rows):
    first, second = weights(torch.bfloat16)
    x, y = torch.randn(rows, SIZE).bfloat16(), torch.randn(rows, sum(SLICES)).bfloat16()
    mapping = (5,) * rows  # of rows without an adapter, vLLM's are wrong
    right = expected(x, y, first, second, mapping, 1.0)
    gaps = []
    for kind in (PunicaWrapperCPU, ours):
        found = y.clone()
        linear(wrapped(kind, mapping, True), x, found, first, second, 1.0)
        gaps.append(gap(found, right))
    assert gaps[1] <= 1.5 * gaps[0]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_another_dtype_than_the_models(kind):
    """vLLM's option --lora-dtype."""
    first, second = weights(torch.float32)
    x, y = torch.randn(ROWS, SIZE).bfloat16(), torch.randn(ROWS, sum(SLICES)).bfloat16()
    right, plain = expected(x, y, first, second, MIXED, 0.5), in_torch(x, y, first, second, MIXED, 0.5)
    linear(wrapped(kind, MIXED, True), x, y, first, second, 0.5)
    assert gap(y, right) <= 1.5 * gap(plain, right)


@pytest.mark.skipif(not vllm_version().startswith("0.32."), reason="vLLM 0.33 leaves such rows as they are")
def test_vllms_own_gives_rows_without_an_adapter_that_of_the_last_slot():
    first, second = weights(torch.float32)
    x, y = torch.randn(ROWS, SIZE), torch.zeros(ROWS, sum(SLICES))
    linear(wrapped(PunicaWrapperCPU, MIXED, True), x, y, first, second, 1.0)
    assert bool((y[MIXED.index(0)] != 0).any())


@pytest.mark.parametrize("add_inputs", [True, False])
def test_embeddings_and_logits(add_inputs):
    made = wrapped(MaskedLoRA, MIXED, True)
    matrices = torch.randn(SLOTS, 1, SIZE, RANK)
    x, y = torch.randn(ROWS, RANK), torch.randn(ROWS, SIZE)
    before = y.clone()
    made.add_lora_embedding(y, x, matrices, add_inputs=add_inputs)
    for row, number in enumerate(MIXED):
        added = matrices[IDS.index(number), 0] @ x[row] if number else torch.zeros(SIZE)
        expected = added + before[row] if add_inputs or not number else added
        torch.testing.assert_close(y[row], expected, atol=1e-5, rtol=1e-5)
    made._sampler_indices[:2] = torch.tensor([2, -1])
    low, high = torch.randn(SLOTS, 1, RANK, SIZE), torch.randn(SLOTS, 1, 50, RANK)
    x, y = torch.randn(2, SIZE), torch.zeros(2, 50)
    made.add_lora_logits(y, x, low, high, 2.0)
    torch.testing.assert_close(y[0], high[2, 0] @ (2.0 * (low[2, 0] @ x[0])), atol=1e-5, rtol=1e-5)
    assert not y[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_for_any_number_of_rows_and_any_adapters(kind):
    first, second = weights(torch.float32)
    holder = SimpleNamespace(made=None)

    @torch.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    def run(x, y):
        holder.made.add_lora_linear(y, x, first, second, 1.0, SLICES)
        return y

    holder.made = wrapped(kind, MIXED, True)
    for mapping in (MIXED, (0,) * ROWS, (9, 0, 5)):
        holder.made.update_metadata(LoRAMapping(mapping, (0,), is_prefill=True), IDS, SLOTS, 100)
        x, y = torch.randn(len(mapping), SIZE), torch.randn(len(mapping), sum(SLICES))
        right = expected(x, y, first, second, mapping, 1.0)
        torch.testing.assert_close(run(x, y.clone()).double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 40])
def test_the_op_of_each_dtype_and_rank_on_rows_of_a_larger_matrix(dtype, rank):
    """Runs of one row, of few and of many; 8 rows more than the op multiplies one by one."""
    mapping = (5, 0, *(9,) * 3, 0, *(5,) * 16)
    first = [torch.randn(SLOTS, 1, rank, 50, dtype=dtype) for _ in SLICES]
    second = [torch.randn(SLOTS, 1, size, rank, dtype=dtype) for size in SLICES]
    x = torch.randn(len(mapping), 64, dtype=dtype)[:, :50]
    y = torch.randn(len(mapping), sum(SLICES) + 8, dtype=dtype)
    right, plain = expected(x, y, first, second, mapping, 0.25), in_torch(x, y, first, second, mapping, 0.25)
    torch.ops.starling_kernels.add_lora(y, x, wrapped(OwnLoRA, mapping, True)._token_lora_indices, first, second, 0.25)
    assert gap(y, right) <= (1e-3 if dtype == torch.float32 else 1.5 * gap(plain, right))
    assert bool((y[1] == right[1]).all()), "a row without an adapter stays as it is"


def test_the_op_refuses_what_it_would_read_outside_of():
    x, y, slots = torch.zeros(2, SIZE), torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64)
    first, second = weights(torch.float32)

    def refused(match, **changed):
        given = {"y": y, "x": x, "indices": slots, "first": list(first), "second": list(second), "scale": 1.0} | changed
        with pytest.raises(ValueError, match=match):
            torch.ops.starling_kernels.add_lora(**given)

    refused("no slot for each row", indices=slots[:1])
    refused("slot 3: there are 3", indices=slots + SLOTS)
    refused("32 columns, and y has 31", y=torch.zeros(2, 31))
    refused("one dtype", y=y.bfloat16())
    refused("for rows of 8", x=torch.zeros(2, 8))
    refused("as many rows", y=torch.zeros(3, 32))
    refused("two matrices", second=list(second[:1]))
