"""Calls on runs of heads, with fakes of vLLM's builders and implementations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from starling.attention_backends.star import gpu_impl
from starling.attention_backends.star.backend import make_star_backend
from starling.attention_backends.star.gpu_impl import make_gpu_impl
from starling.attention_backends.star.head_step import HeadCall, HeadStep, unsupported_reason
from starling.attention_backends.star.step import StarStep, open_step
from starling.scheduler.planning.plan import DenseHeads, StarPlan
from starling.vllm_compat.head_attention import impl_of_heads
from tests.unit.attention_backends.test_rows import batch_metadata
from tests.unit.attention_backends.test_step import SPEC, FakeBackend, FakeBuilder, make_builder

PLAN = StarPlan(8, 4, 4, 30, 40, dense_heads=DenseHeads(2, 8, "digest"))
RANKS = {"layer": np.array([0, 5, 1, 4])}


class HeadsBuilder(FakeBuilder):
    """Its metadata says for how many heads it was made, and for which rows."""

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return self.num_heads_q, self.num_heads_kv, self.use_full_cuda_graph, common_attn_metadata.seq_lens.tolist()


class HeadsBackend(FakeBackend):
    get_builder_cls = staticmethod(lambda: HeadsBuilder)


def heads_builder(by_parts=True):
    """The builder of a GPU, whose metadata stays on the CPU."""
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        scheduler_config=SimpleNamespace(max_num_seqs=10, max_num_batched_tokens=400),
        model_config=SimpleNamespace(max_model_len=1000),
    )
    return make_star_backend(HeadsBackend, by_parts).get_builder_cls()(SPEC, ["layer"], config, torch.device("meta"))


def step_with(ranks, plan=PLAN):
    return StarStep({"r0": plan}, {"r0": 20}, lambda: ["r0"], lambda rows: None, heads=HeadStep([plan], ranks))


def test_metadata_is_made_once_for_rows_and_a_number_of_heads():
    step = step_with(RANKS)
    with open_step(step):
        whole = heads_builder().build(0, batch_metadata([20], [20], columns=12))
        calls = step.heads.calls("layer")
    rows = [8, 16, 12]  # three star blocks; two have the anchor and the overlap before their own tokens
    assert whole == (8, 4, True, rows)
    assert [(call.first, call.stop) for call in calls] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    dense, star = (2, 1, False, [20]), (2, 1, False, rows)
    assert [call.metadata for call in calls] == [dense, star, dense, star]
    assert calls[0].metadata is calls[2].metadata and calls[1].metadata is calls[3].metadata


def test_a_layer_none_of_whose_heads_is_dense_is_one_call():
    step = step_with({"layer": RANKS["layer"] + 2})
    with open_step(step):
        heads_builder().build(0, batch_metadata([20], [20], columns=12))
    assert step.heads.calls("layer") is None


def test_calls_that_no_layer_makes_are_an_error():
    step = step_with(RANKS)
    with pytest.raises(RuntimeError, match="dense heads ran, but no layer took them"), open_step(step):
        heads_builder().build(0, batch_metadata([20], [20], columns=12))
        assert step.heads.calls("a layer with a window") is None


def test_a_server_that_is_not_started_for_dense_heads_has_vllms_implementation_and_does_not_run_them():
    backend = make_star_backend(FakeBackend)
    assert backend.get_impl_cls() is object
    with pytest.raises(RuntimeError, match="dense heads ran, but no layer took them"), open_step(step_with(RANKS)):
        make_builder(device="meta").build(0, batch_metadata([20], [20], columns=12))


def test_groups_of_layers_build_their_own_metadata_where_there_is_more_than_vllm_would_update():
    """Decode steps see everything with every head, so that their full CUDA graphs stay."""
    builder = heads_builder()
    assert HeadsBuilder.supports_update_block_table and not builder.supports_update_block_table
    assert builder.get_cudagraph_support(builder.vllm_config, SPEC) is AttentionCGSupport.UNIFORM_BATCH
    assert heads_builder(by_parts=False).supports_update_block_table


class FakeImpl:
    """Adds 1 to the part of the output that it has, and notes its shapes and whether the output is contiguous."""

    num_heads, num_kv_heads, head_size = 8, 4, 2
    sinks = torch.arange(8.0)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        layer.calls.append((self.sinks.tolist(), kv_cache[0, :, 0, 0].tolist(), output.is_contiguous()))
        assert query.shape[1] == output.shape[1] == self.num_heads == 2 * self.num_kv_heads
        output[:3] = query[:3] + attn_metadata
        return output


@pytest.mark.parametrize(("backend", "is_copied"), [("FLASH_ATTN", False), ("FLASHINFER", True), ("CPU_ATTN", True)])
def test_a_call_has_the_slices_of_its_heads(backend, is_copied, monkeypatch):
    """Two of the kernels take the heads of an output to be next to one another. Padding is not written."""
    heads = SimpleNamespace(calls=lambda name: [HeadCall(0, 1, 100), HeadCall(1, 4, 200)])
    monkeypatch.setattr(gpu_impl, "current_step", lambda: SimpleNamespace(num_tokens=3, documents=None, heads=heads))
    layer = SimpleNamespace(layer_name="layer", calls=[])
    query = torch.arange(4 * 16).view(4, 8, 2).float()
    cache = torch.arange(4.0)[None, :, None, None].expand(3, 4, 5, 4)
    output = torch.zeros(4, 16)
    impl = make_gpu_impl(FakeImpl, backend)()
    assert impl.forward(layer, query, None, None, cache, object(), output) is output
    added = torch.tensor([100.0] * 4 + [200.0] * 12)
    assert torch.equal(output[:3], query.view(4, 16)[:3] + added) and not output[3].any()
    first, second = layer.calls
    assert first == ([0.0, 1.0], [0.0], is_copied)
    assert second == ([2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0, 2.0, 3.0], is_copied)
    assert impl.num_heads == 8 and len(impl.sinks) == 8


def test_an_implementation_for_some_heads_has_all_else_of_the_layers():
    impl = FakeImpl()
    impl.scale = 0.5
    part = impl_of_heads(impl, 1, 3)
    assert type(part) is FakeImpl and part.scale == 0.5
    assert (part.num_heads, part.num_kv_heads, part.sinks.tolist()) == (4, 2, [2.0, 3.0, 4.0, 5.0])


REFUSED = {
    "not a decoder's": {"attn_type": "encoder"},
    "ALiBi slopes": {"impl": SimpleNamespace(alibi_slopes=[1.0], sliding_window=(-1, -1))},
    "sliding window": {"impl": SimpleNamespace(alibi_slopes=None, sliding_window=(63, 0))},
    "its cache is nvfp4": {"kv_cache_dtype": "nvfp4"},
    "its cache is int8_per_token_head": {"kv_cache_dtype": "int8_per_token_head"},
    "a scale for each head": {"_k_scale": torch.ones(4)},
}


@pytest.mark.parametrize("reason", [None, *REFUSED])
def test_layers_whose_heads_can_not_be_computed_in_several_calls_are_refused(reason):
    layer = SimpleNamespace(
        attn_type="decoder",
        impl=SimpleNamespace(alibi_slopes=None, sliding_window=(-1, -1)),
        kv_cache_dtype="fp8",
        _k_scale=torch.tensor(1.0),
        _v_scale=torch.tensor(1.0),
    )
    vars(layer).update(REFUSED.get(reason, {}))
    found = unsupported_reason(layer)
    assert found is None if reason is None else reason in found
