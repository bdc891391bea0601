"""The step that the worker opens and builders read, and the wrapped backend, with fakes of vLLM's objects."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from starling.attention_backends.star import backend as star_backend
from starling.attention_backends.star import document_step
from starling.attention_backends.star.backend import PATHS, WRAPPED, make_star_backend, takes_star, virtual_bounds
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.remote_queries import RemoteStep
from starling.attention_backends.star.rows import split_rows
from starling.attention_backends.star.step import StarStep, current_step, open_step, set_positions
from starling.engine_ext.worker.star_worker import StarRequests
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import KEY, RemoteShards, RequestMetadata, Shard
from tests.unit.attention_backends.test_rows import batch_metadata
from tests.unit.device_copies import AsyncCopies

PLAN = StarPlan(8, 8, 0, 30, 40)
SPEC = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)


class FakeBuilder(AttentionMetadataBuilder):
    """A builder as FlashAttention's; its metadata is the CommonAttentionMetadata that it gets."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True
    num_heads_q, num_heads_kv, use_full_cuda_graph, max_cudagraph_size = 8, 4, True, 512

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return common_attn_metadata

    def update_block_table(self, metadata, blk_table, slot_mapping):
        return metadata.replace(block_table_tensor=blk_table, slot_mapping=slot_mapping)


class FakeBackend(AttentionBackend):
    get_name = staticmethod(lambda: "FLASH_ATTN")
    get_impl_cls = staticmethod(lambda: object)
    get_builder_cls = staticmethod(lambda: FakeBuilder)


def make_builder(spec=SPEC, device="cpu"):
    scheduler = SimpleNamespace(max_num_seqs=10, max_num_batched_tokens=400)
    model = SimpleNamespace(max_model_len=1000)
    config = SimpleNamespace(scheduler_config=scheduler, model_config=model, additional_config={})
    return make_star_backend(FakeBackend).get_builder_cls()(spec, ["layer"], config, torch.device(device))


def make_step(plans, scheduled, counted=None):
    return StarStep(plans, scheduled, lambda: list(scheduled), (counted if counted is not None else []).append)


def test_the_wrapped_backend_has_the_name_of_the_backend_and_is_made_once():
    wrapped = make_star_backend(FakeBackend)
    assert issubclass(wrapped, FakeBackend)
    assert wrapped.get_name() == "FLASH_ATTN"
    assert make_star_backend(FakeBackend) is wrapped


def test_star_rows_reach_the_base_builder_and_are_counted_once():
    counted = []
    common = batch_metadata([1, 20], [9, 20], columns=12)
    builder, other = make_builder(), make_builder()
    with open_step(make_step({"b": PLAN}, {"a": 1, "b": 20}, counted)):
        built = builder.build(0, common)
        other.build(0, common)
        moved = other.update_block_table(built, common.block_table_tensor + 100, common.slot_mapping)
    assert built.seq_lens.tolist() == [9, 8, 16, 12]
    assert moved.block_table_tensor[3, :3].tolist() == [112, 113, 116]
    assert len(counted) == 1


def test_without_a_step_the_builder_gets_the_metadata_itself():
    """As in dense batches, dummy runs and profiling runs, also after a star step."""
    common = batch_metadata([1, 20], [9, 20], columns=12)
    builder = make_builder()
    with open_step(make_step({"b": PLAN}, {"a": 1, "b": 20})):
        builder.build(0, common)
    assert current_step() is None
    assert builder.build(0, common) is common
    table = common.block_table_tensor
    assert builder.update_block_table(common, table, common.slot_mapping).block_table_tensor is table


REMOTE = RemoteShards("own", (Shard("b", 16, 12, [{"name": "server"}]),))


def test_a_decode_row_with_keys_on_another_replica_is_rewritten_and_has_a_query_for_that_replica():
    rows, builder = [], make_builder()
    step = StarStep(
        {"b": PLAN}, {"a": 1, "b": 1}, lambda: ["a", "b"], rows.append, remote=RemoteStep({"b": REMOTE}, list)
    )
    with open_step(step):
        built = builder.build(0, batch_metadata([1, 1], [9, 45], columns=12))
        queries = current_step().remote_attention(4)
        assert current_step().remote_attention(4) is queries, "the object is made once for each step"
    assert built.seq_lens.tolist() == [9, 45 - 12]
    (query,) = queries
    assert query.tokens.tolist() == [1] and query.addresses == [{"name": "server"}]
    (span,) = query.spans
    assert (span.request_id, span.shard, span.first_query, span.num_queries) == ("b", "b", 0, 1)
    assert (span.first_pages.tolist(), span.num_keys.tolist(), span.rotate_by.tolist()) == ([0], [12], [0])
    assert query.pairs() == 12


def test_a_step_whose_rows_see_no_keys_on_other_replicas_has_no_remote_queries():
    builder = make_builder()
    step = StarStep({"b": PLAN}, {"a": 1, "b": 20}, lambda: ["a", "b"], lambda rows: None, remote=RemoteStep({}, list))
    with open_step(step):
        with pytest.raises(RuntimeError, match="before its rows are made"):
            step.remote_attention(4)
        builder.build(0, batch_metadata([1, 20], [9, 20], columns=12))
        assert step.remote_attention(4) is None


def test_after_a_failed_step_no_step_is_open():
    with pytest.raises(KeyError), open_step(make_step({}, {})):
        raise KeyError
    assert current_step() is None


@pytest.mark.parametrize("scheduled", [{"a": 20, "b": 1}, {"a": 1, "b": 19}, {"a": 1}])
def test_rows_that_differ_from_the_schedulers_step_are_an_error(scheduled):
    step = make_step({"b": PLAN}, scheduled)
    with pytest.raises(RuntimeError, match="matched"):
        step.rows(batch_metadata([1, 20], [9, 20], columns=12), 4)


def test_a_star_step_that_no_layer_read_is_an_error():
    with (
        pytest.raises(RuntimeError, match="no full-attention layer"),
        open_step(make_step({"a": PLAN}, {"a": 20})),
    ):
        pass


def test_layers_other_than_full_attention_get_the_metadata_itself():
    shape = {"block_size": 4, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    assert takes_star(SPEC)
    for spec in (
        SlidingWindowSpec(**shape, sliding_window=16),
        ChunkedLocalAttentionSpec(**shape, attention_chunk_size=16),
        FullAttentionSpec(**shape, sliding_window=16),
        FullAttentionSpec(**shape, non_causal=True),
    ):
        assert not takes_star(spec)
        common = batch_metadata([20], [20], columns=12)
        step = make_step({"a": PLAN}, {"a": 20})
        step.engaged = True
        with open_step(step):
            assert make_builder(spec).build(0, common) is common


def test_gpu_builders_have_room_for_virtual_rows_and_keep_decode_graphs():
    assert make_builder(device="meta").max_num_seqs == 3 * 10 + 400 // 4
    assert make_builder().max_num_seqs == 10
    support = make_star_backend(FakeBackend).get_builder_cls().get_cudagraph_support(None, SPEC)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    for tokens_of_a_decode in (1, 4):  # without drafts, and with three
        graphs = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
        graphs.cudagraph_capture_sizes, graphs.max_cudagraph_capture_size = [4, 8], 8
        left = graphs.resolve_cudagraph_mode_and_sizes(support, "FAKE", tokens_of_a_decode)
        assert left.decode_mode() is CUDAGraphMode.FULL


@st.composite
def batches(draw):
    """(tokens of a step, page size, max_model_len, plans, query lengths, lengths) of a batch that fits its bounds."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    plans, query_lens, seq_lens = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        block = draw(st.integers(1, 6)) * page_size
        anchor, overlap = (draw(st.integers(0, block // page_size)) * page_size for _ in range(2))
        context_end = draw(st.integers(1, 6 * block))
        prompt = context_end + draw(st.integers(1, 2 * block))
        end = draw(st.integers(1, prompt))
        plans.append(StarPlan(block, anchor, overlap, context_end, prompt))
        query_lens.append(draw(st.integers(1, end)))
        seq_lens.append(end)
    return sum(query_lens), page_size, max(seq_lens), plans, query_lens, seq_lens


def num_pages(rows, page_size):
    return int((-(-rows.seq_lens // page_size)).sum())


@settings(max_examples=300, deadline=None)
@given(batches())
def test_virtual_rows_and_their_pages_stay_within_what_builders_have_room_for(batch):
    tokens, page_size, max_model_len, plans, query_lens, seq_lens = batch
    rows = split_rows(plans, query_lens, seq_lens, page_size)
    if rows is None:
        return
    scheduler = SimpleNamespace(max_num_seqs=len(plans), max_num_batched_tokens=tokens)
    max_rows, max_pages = virtual_bounds(scheduler, max_model_len, page_size)
    assert len(rows.source) <= max_rows
    assert num_pages(rows, page_size) <= max_pages


def test_three_tokens_can_have_three_rows_of_nearly_all_pages():
    """Therefore ``virtual_bounds`` can't count fewer than three for each request."""
    size = 1 << 16
    rows = split_rows([StarPlan(size, size, size, 2 * size + 1, 2 * size + 2)], [3], [2 * size + 2], 16)
    assert rows.query_lens.tolist() == [1, 1, 1]
    assert num_pages(rows, 16) > 2.99 * (2 * size + 2) / 16


def test_only_backends_that_can_be_wrapped_are_attributes_of_the_module():
    assert star_backend.CPU_ATTN.get_name() == "CPU_ATTN"
    for name in ("FLEX_ATTENTION", "StarFlexAttentionBackend", "FlashAttentionBackend"):
        with pytest.raises(AttributeError):
            getattr(star_backend, name)


def test_a_star_backend_is_found_by_its_class_name_too():
    """As CUDA's platform finds it."""
    assert star_backend.StarCPUAttentionBackend is star_backend.CPU_ATTN
    assert star_backend.CPU_ATTN.full_cls_name() == (star_backend.__name__, "StarCPUAttentionBackend")
    assert {"StarFlashInferBackend", "StarTritonAttentionBackend", "StarTritonBackend", *WRAPPED} <= set(PATHS)


def step_output(new=(), cached=(), finished=()):
    def request(name, plan, start):
        extra = {KEY: RequestMetadata(plan).to_wire()}
        return SimpleNamespace(
            req_id=name, sampling_params=SimpleNamespace(extra_args=extra), num_computed_tokens=start
        )

    names, starts = zip(*cached, strict=True) if cached else ((), ())
    return SimpleNamespace(
        scheduled_new_reqs=[request(*item) for item in new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(names), num_computed_tokens=list(starts)),
        finished_req_ids=set(finished),
    )


def test_plans_are_kept_until_their_requests_finish():
    requests = StarRequests()
    assert requests.update(step_output(new=[("a", PLAN, 0), ("b", None, 0)])) == {"a": PLAN}
    assert requests.update(step_output(cached=[("a", 20), ("b", 20)])) == {"a": PLAN}
    assert requests.update(step_output(cached=[("a", 30), ("b", 30)])) == {}  # after the context: a dense step
    assert requests.update(step_output(cached=[("a", 0)])) == {"a": PLAN}  # preempted and resumed
    assert requests.update(step_output(new=[("a", PLAN, 0)])) == {"a": PLAN}  # preempted and resumed on the V2 runner
    assert requests.update(step_output(finished=["a"])) == {}
    assert requests.metadata == {}


def test_a_request_with_keys_on_other_replicas_is_a_star_request_until_it_finishes():
    requests, output = StarRequests(), step_output(new=[("a", PLAN, 28), ("b", PLAN, 0)])
    output.scheduled_new_reqs[0].sampling_params.extra_args[KEY] = RequestMetadata(PLAN, remote=REMOTE).to_wire()
    assert requests.update(output) == {"a": PLAN, "b": PLAN}
    assert requests.metadata["a"].remote == REMOTE
    assert requests.update(step_output(cached=[("a", 45), ("b", 45)])) == {"a": PLAN}
    assert requests.update(step_output(cached=[("b", 46)], finished=["a"])) == {}
    assert set(requests.metadata) == {"b"}


@pytest.mark.parametrize("fails", [False, True])
def test_positions_are_those_of_the_prompt_again_after_the_step(fails):
    """Model runner V2 samples after the step, and counts output tokens by them."""
    part, positions = DocumentStep(), torch.arange(7, 13)
    step = StarStep({}, {}, list, lambda rows: None, part)
    part._shifts, step.engaged = np.array([0, 0, -6, -6, -6, 0]), True
    with pytest.raises(RuntimeError, match="no memory") if fails else nullcontext(), open_step(step):
        set_positions(positions)
        assert positions.tolist() == [7, 8, 3, 4, 5, 12]
        if fails:
            raise RuntimeError("no memory")
    assert positions.tolist() == [7, 8, 9, 10, 11, 12]
    set_positions(positions)
    assert positions.tolist() == [7, 8, 9, 10, 11, 12], "no step is open"


def test_the_positions_of_all_requests_are_set_at_once(monkeypatch):
    """And put back at once: one copy to the device, one sum and one difference, for however many requests."""
    blocks = ((0, 3), (4, 6))
    plan = StarPlan(16, 0, 0, 8, 10, documents=blocks)
    ids = [str(index) for index in range(9)]
    part = DocumentStep()
    step = StarStep(dict.fromkeys(ids[1:], plan), dict.fromkeys(ids, 1), lambda: ids, lambda rows: None, part)
    step.rows(batch_metadata([1] * 9, [12] * 9, 4), 4)
    positions = torch.full((9,), 11)
    with AsyncCopies(monkeypatch, document_step) as copies:
        part.set_positions(positions)
        set_to = positions.clone()
        part.ended()
    assert set_to.tolist() == [11] + 8 * [int(plan.positions(11, 12)[0])] != [11] * 9
    assert positions.tolist() == [11] * 9
    assert copies.copies == 1
    assert copies.operations == {"aten::add_": 1, "aten::clone": 1, "aten::sub_": 1}, "a clone of the test"


def test_setting_positions_waits_for_no_gpu(monkeypatch):
    part = DocumentStep()
    part._shifts = np.array([0, 0, -6, -6, -6, 0])
    with AsyncCopies(monkeypatch, document_step):
        part.set_positions(torch.arange(7, 13, device="meta"))
        part.ended()
