"""The step between worker and builders, and the wrapped backend, against fake vLLM objects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from attention_backends.star import backend as star_backend
from attention_backends.star.backend import make_star_backend, takes_star
from attention_backends.star.step import StarStep, current_step, open_step
from engine_ext.worker import PlanBook
from scheduler.plan import PLAN_KEY, StarPlan
from scheduler.share import SHARE_KEY, Attend, Shard, Share
from tests.unit.test_rows import batch_metadata

PLAN = StarPlan(8, 8, 0, 30, 40)
SPEC = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)


class FakeBuilder(AttentionMetadataBuilder):
    """Stands for a GPU backend's builder: keeps what it is given."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

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
    config = SimpleNamespace(scheduler_config=scheduler)
    return make_star_backend(FakeBackend).get_builder_cls()(spec, ["layer"], config, torch.device(device))


def make_step(plans, scheduled, counted=None):
    return StarStep(plans, scheduled, lambda common: list(scheduled), (counted if counted is not None else []).append)


def test_the_wrapped_backend_keeps_its_name_and_is_made_once():
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


def test_without_a_step_nothing_is_rewritten():
    """Dense batches, dummy and profiling runs: the very object goes through, also right after a star step."""
    common = batch_metadata([1, 20], [9, 20], columns=12)
    builder = make_builder()
    with open_step(make_step({"b": PLAN}, {"a": 1, "b": 20})):
        builder.build(0, common)
    assert current_step() is None
    assert builder.build(0, common) is common
    table = common.block_table_tensor
    assert builder.update_block_table(common, table, common.slot_mapping).block_table_tensor is table


SHARDS = (Shard("b", 16, 12, [{"name": "holder"}]),)


def test_a_decode_row_whose_keys_are_elsewhere_is_rewritten_and_its_layers_know_whom_to_ask():
    asked, builder = [], make_builder()
    attend = {"b": Attend("own", SHARDS)}
    step = StarStep({"b": PLAN}, {"a": 1, "b": 1}, lambda _: ["a", "b"], asked.append, attend, lambda asks: asks)
    common = batch_metadata([1, 1], [9, 45], columns=12)
    with open_step(step):
        built = builder.build(0, common)
        assert builder.build(0, common).shards is built.shards, "made once a step"
    assert built.seq_lens.tolist() == [9, 45 - 12]
    (ask,) = built.shards
    assert ask.tokens.tolist() == [1] and ask.addresses == [{"name": "holder"}]
    (span,) = ask.spans
    assert (span.request_id, span.shard, span.queries, span.first, span.pages) == ("b", "b", 1, 0, 3)
    assert ask.pairs(4) == 12


def test_without_keys_elsewhere_nobody_is_asked():
    builder = make_builder()
    with open_step(make_step({"b": PLAN}, {"a": 1, "b": 20})):
        assert not hasattr(builder.build(0, batch_metadata([1, 20], [9, 20], columns=12)), "shards")


def test_a_failed_step_leaves_no_plan_behind():
    with pytest.raises(KeyError), open_step(make_step({}, {})):
        raise KeyError
    assert current_step() is None


@pytest.mark.parametrize("scheduled", [{"a": 20, "b": 1}, {"a": 1, "b": 19}, {"a": 1}])
def test_rows_that_are_not_the_schedulers_are_an_error(scheduled):
    step = make_step({"b": PLAN}, scheduled)
    with pytest.raises(RuntimeError, match="matched"):
        step.rows(batch_metadata([1, 20], [9, 20], columns=12), 4)


def test_a_star_step_that_no_layer_took_is_an_error():
    with (
        pytest.raises(RuntimeError, match="no full-attention layer"),
        open_step(make_step({"a": PLAN}, {"a": 20})),
    ):
        pass


def test_layers_that_are_not_full_attention_are_left_alone():
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


def test_gpu_builders_get_room_for_virtual_rows_and_keep_decode_graphs():
    assert make_builder(device="meta").max_num_seqs == 3 * 10 + 400 // 4
    assert make_builder().max_num_seqs == 10
    support = make_star_backend(FakeBackend).get_builder_cls().get_cudagraph_support(None, SPEC)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_only_the_wrapped_names_resolve():
    assert star_backend.CPU_ATTN.get_name() == "CPU_ATTN"
    with pytest.raises(AttributeError):
        _ = star_backend.FLEX_ATTENTION


def step_output(new=(), cached=(), finished=()):
    def request(name, plan, start):
        extra = {} if plan is None else {PLAN_KEY: plan.to_wire()}
        return SimpleNamespace(
            req_id=name, sampling_params=SimpleNamespace(extra_args=extra), num_computed_tokens=start
        )

    names, starts = zip(*cached, strict=True) if cached else ((), ())
    return SimpleNamespace(
        scheduled_new_reqs=[request(*item) for item in new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(names), num_computed_tokens=list(starts)),
        finished_req_ids=set(finished),
    )


def test_plans_are_kept_from_admission_to_finish():
    book = PlanBook()
    assert book.update(step_output(new=[("a", PLAN, 0), ("b", None, 0)])) == {"a": PLAN}
    assert book.update(step_output(cached=[("a", 20), ("b", 20)])) == {"a": PLAN}
    assert book.update(step_output(cached=[("a", 30), ("b", 30)])) == {}  # past the context: a dense step
    assert book.update(step_output(cached=[("a", 0)])) == {"a": PLAN}  # preempted and resumed
    assert book.update(step_output(new=[("a", PLAN, 0)])) == {"a": PLAN}  # the same on the V2 runner
    assert book.update(step_output(finished=["a"])) == {}
    assert book.plans == {}


def test_a_request_with_keys_elsewhere_is_a_star_request_to_its_end():
    book, output = PlanBook(), step_output(new=[("a", PLAN, 28), ("b", PLAN, 0)])
    share = Share(None, Attend("own", SHARDS))
    output.scheduled_new_reqs[0].sampling_params.extra_args[SHARE_KEY] = share.to_wire()
    assert book.update(output) == {"a": PLAN, "b": PLAN}
    assert book.attends == {"a": Attend("own", SHARDS)}
    assert book.update(step_output(cached=[("a", 45), ("b", 45)])) == {"a": PLAN}
    assert book.update(step_output(cached=[("b", 46)], finished=["a"])) == {}
    assert book.attends == {}
