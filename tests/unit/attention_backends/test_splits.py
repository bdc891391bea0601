"""What FlashAttention 3 allocates for a step in virtual rows: its heuristic, on metadata of vLLM's wrapped builder."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from starling.attention_backends.star.backend import make_star_backend
from starling.attention_backends.star.head_step import HeadStep
from starling.attention_backends.star.step import StarStep, open_step
from starling.scheduler.planning.plan import DenseHeads, StarPlan
from tests.unit.attention_backends.test_rows import batch_metadata

MULTIPROCESSORS = 132  # of an H100
TILE = 128  # queries x heads of a group, and keys, of FlashAttention 3's tiles for heads of 128 and paged keys
PAGE, HEADS, KV_HEADS, HEAD_SIZE = 16, 32, 8, 128
GRAPH_SIZE, GRAPH_SPLITS = 512, 32
DECODE = 8192  # keys


def heuristic_splits(max_queries: int, max_keys: int, heads: int, kv_heads: int) -> int:
    """Return the number of splits that FlashAttention 3 takes where it is given none, by its published heuristic.

    It counts the tiles of one row that has the most queries and the most keys. Where these fill 0.8 of the GPU, it does
    not split; else it takes the fewest splits whose last wave is nearly as full as that of the best number.
    """
    query_tiles = math.ceil(max_queries * heads // kv_heads / TILE) * kv_heads
    key_tiles = math.ceil(max_keys / TILE)
    if query_tiles >= 0.8 * MULTIPROCESSORS or key_tiles <= 4:
        return 1
    waves = [query_tiles * splits / MULTIPROCESSORS for splits in range(1, min(128, MULTIPROCESSORS, key_tiles) + 1)]
    fullness = [count / math.ceil(count) for count in waves]
    return next(splits for splits, part in enumerate(fullness, start=1) if part >= 0.85 * max(fullness))


def partial_bytes(metadata: Any, heads: int = HEADS, kv_heads: int = KV_HEADS) -> int:
    """Return the bytes of FlashAttention 3's partial results: a float32 output and log-sum-exp for each split."""
    splits = metadata.max_num_splits or heuristic_splits(metadata.max_query_len, metadata.max_seq_len, heads, kv_heads)
    return 0 if splits == 1 else splits * heads * metadata.num_actual_tokens * (HEAD_SIZE + 1) * 4


@pytest.fixture
def flash_attention_3(monkeypatch):
    """vLLM's module as on an H100. Scheduler metadata is the number of splits that it was made for."""
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **options: 3)
    made = lambda **options: torch.tensor([options["num_splits"]], dtype=torch.int32)  # noqa: E731
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", made, raising=False)


def make_builder(by_parts: bool = False, graphs: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
    model = SimpleNamespace(
        max_model_len=32_768,
        rswa_window=None,
        is_mm_prefix_lm=False,
        hf_config=SimpleNamespace(model_type="llama"),
        get_num_attention_heads=lambda parallel: HEADS,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            cudagraph_mode=graphs,
            max_cudagraph_capture_size=GRAPH_SIZE if graphs.has_full_cudagraphs() else 0,
            static_forward_context={},
        ),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=GRAPH_SPLITS),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=8192),
        additional_config={},
    )
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)
    backend = make_star_backend(flash_attn.FlashAttentionBackend, by_parts)
    return backend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))


def documents_beside_a_decode(document: int, count: int) -> tuple[Any, StarStep]:
    """Return the metadata of a cold prefill of ``count`` documents beside one dense decode, and the step."""
    context = document * count
    spans = tuple((start, start + document) for start in range(0, context, document))
    plan = StarPlan(document, 0, 0, context, context + 16, documents=spans)
    batch = batch_metadata([1, context], [DECODE, context], columns=DECODE // PAGE)
    step = StarStep({"documents": plan}, {"decode": 1, "documents": context}, lambda: ["decode", "documents"], id)
    return batch, step


def splits_agree(metadata: Any) -> bool:
    """Whether the scheduler metadata is for the number of splits that layers pass to the kernel."""
    return metadata.scheduler_metadata.tolist() == [metadata.max_num_splits]


@pytest.mark.parametrize("graphs", [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.NONE], ids=["graphs", "eager"])
@pytest.mark.parametrize(("document", "count"), [(320, 25), (128, 60), (2048, 4)])
@pytest.mark.usefixtures("flash_attention_3")
def test_a_step_of_documents_above_graph_size_has_no_partial_results(document, count, graphs):
    """A dense step of as many tokens has none either: its longest row has one split."""
    batch, step = documents_beside_a_decode(document, count)
    builder = make_builder(graphs=graphs)
    assert partial_bytes(builder.build(0, batch)) == 0, "dense"
    with open_step(step):
        metadata = builder.build(0, batch)
    assert len(metadata.seq_lens) == 1 + count
    left_to_the_kernel = replace(metadata, max_num_splits=0)
    assert (partial_bytes(left_to_the_kernel) > 300 << 20) == (document < 2048), "nothing to prevent"
    assert partial_bytes(metadata) == 0
    assert splits_agree(metadata)
    assert builder.build(0, batch).max_num_splits == 0, "the next dense step is vLLM's"


@pytest.mark.usefixtures("flash_attention_3")
def test_a_step_within_graph_size_has_the_partial_results_of_a_dense_one():
    batch, step = documents_beside_a_decode(64, 7)
    builder = make_builder()
    dense = builder.build(0, batch)
    with open_step(step):
        metadata = builder.build(0, batch)
    assert metadata.max_num_splits == GRAPH_SPLITS and splits_agree(metadata)
    assert partial_bytes(metadata) == partial_bytes(dense) <= GRAPH_SPLITS * HEADS * GRAPH_SIZE * (HEAD_SIZE + 1) * 4


@pytest.mark.usefixtures("flash_attention_3")
def test_calls_on_some_heads_above_graph_size_have_no_partial_results():
    plan = StarPlan(128, 0, 0, 1024, 1040, dense_heads=DenseHeads(2, 8, "digest"))
    batch = batch_metadata([1, 1024], [DECODE, 1024], columns=DECODE // PAGE)
    heads = HeadStep([plan], {"layer": torch.tensor([0, 5, 1, 4, 2, 3, 6, 7]).numpy()})
    step = StarStep({"a": plan}, {"decode": 1, "a": 1024}, lambda: ["decode", "a"], id, heads=heads)
    with open_step(step):
        make_builder(by_parts=True).build(0, batch)
        calls = heads.calls("layer")
    assert calls is not None and len(calls) > 1
    for first, stop, metadata in calls:
        assert partial_bytes(metadata, (stop - first) * HEADS // KV_HEADS, stop - first) == 0
        assert splits_agree(metadata)
