"""KV shifting attention against the float32 reference: however a prompt is cut, found in the cache, or preempted."""

from __future__ import annotations

import pytest

from benchmarks.induction_oracle import make_induction_oracle
from benchmarks.random_kv_shift import TINY_BAICHUAN, TINY_LLAMA
from tests.parity.harness import run_engine, star, v2_env
from tests.parity.kv_shift_cases import Model, cached, judged, random_ids

pytestmark = pytest.mark.engine

LIMIT = 1e-4
CONFIGS = {"llama": TINY_LLAMA, "baichuan": TINY_BAICHUAN}
# Tokens of a page of the full-attention layers. Baichuan's windowed layers have twice the bytes a token.
PAGES = {"llama": 32, "baichuan": 64}
# vLLM's default keeps the states of few pages in the prefix cache; this keeps all of them.
DENSE = {"prefix_cache_retention_interval": None}
# Chunks that fall on pages, between them, and within them; prompts share a step where they are small enough.
RUNNERS = {
    "v1-one-shot-compiled": {"max_num_batched_tokens": 2048, "enforce_eager": False},
    "v1-96": DENSE | {"max_num_batched_tokens": 96},
    "v1-7-tp2": DENSE
    | {
        "max_num_batched_tokens": 7,
        "max_num_seqs": 4,
        "tensor_parallel_size": 2,
    },
    "v2": DENSE | {"max_num_batched_tokens": 96, "env": v2_env()},
}
CASES = [
    ("llama", "v1-one-shot-compiled"),
    ("baichuan", "v1-96"),
    ("baichuan", "v1-7-tp2"),
    ("llama", "v2"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Model.random(folder / name, config) for name, config in CONFIGS.items()}


def star_options(page: int) -> list[dict]:
    return [star(2 * page, 7), star(2 * page, 20, anchor_size=page), star(page, 1, anchor_size=page, overlap_size=page)]


def batches_of(page: int) -> list[list[dict]]:
    """Run one after the other: mixed lengths and masks; then what finds pages of these, or of its own batch."""
    first, shared = random_ids(1, 4 * page + 9), random_ids(2, page)
    mixed = [judged(first), judged(random_ids(3, 75)), judged(random_ids(4, 1))]
    starred = [judged(random_ids(5 + index, 6 * page + 5), options) for index, options in enumerate(star_options(page))]
    leaving = [cached(first[: pages * page] + random_ids(10 + pages, 3 + pages)) for pages in range(1, 5)]
    together = [cached(shared + random_ids(20 + length, length)) for length in (3, 5)]
    again = [cached(prompt["ids"], prompt["extra_args"]) for prompt in starred]
    return [mixed + starred, leaving, together, again, mixed[:1]]


@pytest.mark.parametrize(("family", "runner"), CASES)
def test_logprobs_are_those_of_the_reference(models, family, runner, record_property):
    model, page, engine = models[family], PAGES[family], RUNNERS[runner]
    batches = batches_of(page)
    outputs = run_engine(model.path, batches, **engine)["batches"]
    pairs = [pair for batch in zip(batches, outputs, strict=True) for pair in zip(*batch, strict=True)]
    largest = max(model.gap(prompt, output) for prompt, output in pairs)
    record_property("largest gap", f"{largest:.1e}")
    print(f"{family} {runner}: largest gap {largest:.1e}")
    assert largest <= LIMIT
    _, leaving, together, again, _ = ([output["cached"] for output in batch] for batch in outputs)
    assert leaving[-1] == 4 * page and again == [6 * page] * 3
    if "prefix_cache_retention_interval" in engine:
        assert leaving == [pages * page for pages in range(1, 5)]
        # Both in one step: the second finds what the first one writes in it.
        assert together == [0, page] or engine["max_num_batched_tokens"] <= page
    for prompt, output in pairs[3:6]:
        new = output["token_ids"]
        teeth = (model.logprobs(prompt, new) - model.logprobs(prompt, new, dense=True)).abs().max().item()
        assert teeth > 1000 * LIMIT


@pytest.mark.parametrize(("family", "blocks"), [("llama", 18), ("baichuan", 25)])
def test_preempted_requests_and_a_state_that_is_lost(models, family, blocks):
    """A cache too small for all: requests are preempted and resume. The same comparison fails without the state."""
    model, page = models[family], PAGES[family]
    lengths = [page // 2 + 7 * index for index in range(4)]
    kinds = [judged, cached, judged, cached]  # resumed ones find their pages in the cache, or must not look for them
    prompts = [
        kind(random_ids(20 + length, length), max_tokens=4 * page) for kind, length in zip(kinds, lengths, strict=True)
    ]
    sizes = {"max_num_batched_tokens": 48, "max_model_len": 6 * page, "num_gpu_blocks_override": blocks}
    batches = [prompts, {"call": "tests.parity.kv_shift_cases:zero_state"}, prompts[:1]]
    result = run_engine(model.path, batches, env={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, **sizes)
    right, wrong = result["batches"]
    largest = max(model.gap(prompt, output) for prompt, output in zip(prompts, right, strict=True))
    print(f"{family}: {result['metrics']['vllm:num_preemptions']} preemptions, largest gap {largest:.1e}")
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert largest <= LIMIT
    assert model.gap(prompts[0], wrong[0]) > 1000 * LIMIT


def test_the_oracle_retrieves_at_any_distance(tmp_path):
    """Exactly, with an fp8 KV cache beside the state, which stays in the model's dtype with half the tokens a page."""
    needle = list(range(300, 306))
    haystacks = [random_ids(40 + index, length) for index, length in enumerate((10, 700, 4000))]
    prompts = [cached([*hay[:7], *needle, *hay[7:], needle[0]]) for hay in haystacks]
    engine = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "max_num_batched_tokens": 1001}
    outputs = run_engine(make_induction_oracle(tmp_path / "oracle"), [prompts, prompts], **engine)["batches"]
    for batch in outputs:
        assert [output["token_ids"] for output in batch] == [needle[1:]] * len(prompts)
    assert [output["cached"] for output in outputs[1]][-1] > 3900
