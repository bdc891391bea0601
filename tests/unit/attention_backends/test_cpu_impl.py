"""The op that a layer attends with, and the equal results of both ops: on vLLM's cache, through the layer's forward."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder, ops

from starling.attention_backends.kernels.contract import NO_ROTATION
from starling.attention_backends.kernels.cpu.paged_op import Op
from starling.attention_backends.kernels.merge import merge
from starling.attention_backends.star import cpu_impl
from starling.attention_backends.star.head_step import HeadBuilders, HeadCall, attend_by_heads
from starling.features.replicas.remote_attention_server import attend_spans
from starling.features.replicas.remote_query import Span
from tests.unit.attention_backends.test_rows import batch_metadata

HEADS, KV_HEADS, SIZE, PAGE_SIZE, NUM_PAGES = 4, 2, 64, 32, 40


def make(setting="auto", **changes) -> cpu_impl.CpuImpl:
    arguments = {"num_heads": HEADS, "head_size": SIZE, "scale": 0.1, "num_kv_heads": KV_HEADS}
    arguments |= {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    model = SimpleNamespace(dtype=torch.float32)
    config = VllmConfig()
    config.model_config = model
    config.additional_config = {"starling": {"cpu_attention": setting}}
    with set_current_vllm_config(config, check_compile=False):
        return cpu_impl.CpuImpl(**arguments | changes)


def metadata(queries: list[int], keys: list[int], **changes):
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor(keys, dtype=torch.int32)
    page_ids = torch.randperm(NUM_PAGES)[: len(keys) * 8].view(len(keys), 8).int()
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(keys), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=SIZE, seq_lens=seq_lens,
        dtype=torch.float32, query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec",
        enable_kv_split=False, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    fields = {"num_actual_tokens": sum(queries), "max_query_len": max(queries), "max_seq_len": max(keys)}
    fields |= {"query_start_loc": starts, "seq_lens": seq_lens, "block_table": page_ids, "scheduler_metadata": plan}
    return SimpleNamespace(**fields | {"causal": True, "dynamic_causal": None} | changes)


LAYER = SimpleNamespace(layer_name="layer", isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)


def run(impl, batch, query, cache) -> torch.Tensor:
    output = torch.full_like(query, float("nan"))
    return impl.forward(LAYER, query, None, None, cache, batch, output)


def test_both_ops_write_the_same_and_the_selected_one_runs(monkeypatch):
    torch.manual_seed(0)
    impl, batch = make(), metadata([1, 70, 5], [130, 200, 5])
    cache = torch.randn(NUM_PAGES, KV_HEADS, PAGE_SIZE, 2 * SIZE)
    query = torch.randn(76, HEADS, SIZE)
    calls = []
    real = cpu_impl.paged_attention
    monkeypatch.setattr(cpu_impl, "paged_attention", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    monkeypatch.setattr(cpu_impl, "select_op", lambda *args, **kw: Op.STARLING)
    ours = run(impl, batch, query, cache)
    assert calls == [1]
    theirs = run(make("vllm"), batch, query, cache)
    assert calls == [1]
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_type": AttentionType.ENCODER_ONLY}, "decoder"),
        ({"alibi_slopes": [0.1] * HEADS}, "ALiBi"),
        ({"sinks": torch.zeros(HEADS)}, "sinks"),
        ({"sliding_window": 128}, "sliding window"),
        ({"head_size": 72}, "multiple of 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_vllms_op_runs(changes, reason):
    impl = make(**changes)
    assert reason in cpu_impl.unsupported_reason(impl)
    assert not impl.has_op


@pytest.mark.parametrize(
    ("layer", "changes"),
    [
        (SimpleNamespace(isa="amx"), {}),
        (LAYER, {"causal": False}),
        (LAYER, {"dynamic_causal": torch.ones(1)}),
    ],
    ids=["amx", "not causal", "causal by row"],
)
def test_batches_that_vllms_op_runs(monkeypatch, layer, changes):
    monkeypatch.setattr(cpu_impl, "select_op", lambda *args, **kw: Op.STARLING)
    impl, query = make(), torch.randn(1, HEADS, SIZE)
    assert impl.uses_op(query, LAYER, metadata([1], [100]))
    assert not impl.uses_op(query, layer, metadata([1], [100], **changes))


def test_batches_over_an_fp8_cache_are_vllms(monkeypatch):
    monkeypatch.setattr(cpu_impl, "select_op", lambda *args, **kw: Op.STARLING)
    assert not make(kv_cache_dtype="fp8").uses_op(torch.randn(1, HEADS, SIZE), LAYER, metadata([1], [100]))


class OtherReplicas:
    """Other replicas, which attend to every key of the pages in ``table``."""

    def __init__(self, cache: torch.Tensor) -> None:
        self.cache = cache

    def begin(self, layer: str, query: torch.Tensor, scale: float, softcap: float) -> str:
        self.query = layer, scale, softcap
        span = Span("", 0, len(query), [0], [len(self.table) * PAGE_SIZE], [0])
        params = {"scale": scale, "softcap": softcap}
        self.parts = attend_spans(query, self.cache, [span], [self.table], NO_ROTATION, **params)
        return "sent"

    def finish(self, sent: str, out: torch.Tensor, lse: torch.Tensor) -> None:
        assert sent == "sent"
        merged = merge(torch.stack((out, self.parts[0])), torch.stack((lse, self.parts[1])))
        out.copy_(merged[0])


@pytest.mark.parametrize("setting", ["auto", "vllm"])
def test_keys_on_other_replicas_are_merged_whatever_the_setting(setting, monkeypatch):
    """A row of 10 queries whose first 4 pages are on other replicas, compared to the whole row in one batch."""
    torch.manual_seed(0)
    impl, query = make(setting), torch.randn(10, HEADS, SIZE)
    cache = torch.randn(NUM_PAGES, KV_HEADS, PAGE_SIZE, 2 * SIZE)
    whole = metadata([10], [200])
    wanted = run(make("vllm"), whole, query, cache)
    others = OtherReplicas(cache)
    others.table = whole.block_table[0, :4].numpy()
    rest = metadata([10], [200 - 4 * PAGE_SIZE])
    rest.block_table = whole.block_table[:, 4:].contiguous()
    step = SimpleNamespace(documents=None, heads=None, remote_attention={PAGE_SIZE: others}.__getitem__)
    monkeypatch.setattr(cpu_impl, "current_step", lambda: step)
    torch.testing.assert_close(run(impl, rest, query, cache), wanted, rtol=1e-4, atol=1e-5)
    assert others.query == ("layer", 0.1, 0)


@pytest.mark.parametrize("sinks", [None, torch.randn(HEADS)], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vllms_op_gives_for_slices_by_head_what_it_gives_for_all_heads(dtype, sinks):
    """With metadata for the heads of a call. The query is a part of a larger tensor, as in vLLM's models."""
    torch.manual_seed(0)
    cache = torch.randn(NUM_PAGES, KV_HEADS, PAGE_SIZE, 2 * SIZE).to(dtype)
    query = torch.randn(76, HEADS + 3, SIZE).to(dtype)[:, :HEADS]
    builder = SimpleNamespace(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=SIZE, dtype=dtype, window_size=-1, isa="vec",
        kv_cache_dtype="auto", is_cross_attention=False, is_encoder_only_attention=False,
    )  # fmt: skip
    rows = batch_metadata([5, 70, 1], [130, 200, 9], columns=7)
    impl = make(sinks=sinks)
    whole, in_calls = (torch.full((76, HEADS, SIZE), filled, dtype=dtype) for filled in (7.0, 9.0))
    base = CPUAttentionBackendImpl
    base.forward(impl, LAYER, query, None, None, cache, CPUAttentionMetadataBuilder.build(builder, 0, rows), whole)
    builders = HeadBuilders("CPU_ATTN", CPUAttentionMetadataBuilder, builder)
    calls = [HeadCall(head, head + 1, builders.build(0, 1, rows)) for head in range(KV_HEADS)]
    attend_by_heads(base, "CPU_ATTN", impl, calls, 76, LAYER, query, None, None, cache, in_calls)
    assert torch.equal(in_calls, whole)
