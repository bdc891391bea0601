"""KV shifting attention against the float32 reference: however a prompt is cut, found in the cache, or preempted."""

from __future__ import annotations

import pytest

from benchmarks.induction_oracle import make_induction_oracle
from benchmarks.random_kv_shift import TINY_BAICHUAN, TINY_LLAMA
from tests.parity.harness import run_engine, star, v2_env
from tests.parity.kv_shift_cases import RANK, Model, cached, judged, random_ids

pytestmark = pytest.mark.engine

LIMIT = 1e-4
FAR = 32768
CONFIGS = {
    "llama": TINY_LLAMA,
    "baichuan": TINY_BAICHUAN,
    # Two ranks hold the one KV head of its layers without a window, and share the two of the others.
    "baichuan-one-head": TINY_BAICHUAN | {"num_key_value_heads": 1},
}
# Tokens of a page of the full-attention layers. Baichuan's windowed layers have two to four times the bytes a token.
PAGES = {"llama": 32, "baichuan": 64, "baichuan-one-head": 64}
# vLLM's default keeps the states of few pages in the prefix cache; this keeps all of them.
DENSE = {"prefix_cache_retention_interval": None}
# Chunks that fall on pages, between them, and within them; prompts share a step where they are small enough.
RUNNERS = {
    "v1-compiled": {"max_num_batched_tokens": 2048, "enforce_eager": False},
    "v1-tp2": DENSE | {"max_num_batched_tokens": 7, "max_num_seqs": 4, "tensor_parallel_size": 2},
    "v2": DENSE | {"max_num_batched_tokens": 96, "env": v2_env()},
}
CASES = [("llama", "v1-compiled"), ("baichuan-one-head", "v1-tp2"), ("llama", "v2"), ("baichuan", "v2")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Model.random(folder / name, config) for name, config in CONFIGS.items()}


def star_options(page: int) -> list[dict]:
    return [star(2 * page, 7), star(2 * page, 20, anchor_size=page), star(page, 1, anchor_size=page, overlap_size=page)]


def batches_of(page: int, seed: int = 0) -> list[list[dict]]:
    """Run one after the other: mixed lengths and masks; then what finds pages of these, or of its own batch."""
    first, shared = random_ids(seed + 1, 4 * page + 9), random_ids(seed + 2, page)
    mixed = [judged(first), judged(random_ids(seed + 3, 75)), judged(random_ids(seed + 4, 1))]
    starred = [
        judged(random_ids(seed + 5 + index, 6 * page + 5), options) for index, options in enumerate(star_options(page))
    ]
    # Prefixes that end at each page's border, and inside the page after it.
    leaving = [
        cached(first[: pages * page + inside] + random_ids(seed + 10 + pages, 3 + pages))
        for pages in range(1, 5)
        for inside in (0, 5)
    ]
    together = [cached(shared + random_ids(seed + 20 + length, length)) for length in (3, 5)]
    again = [cached(prompt["ids"], prompt["extra_args"]) for prompt in starred]
    return [mixed + starred, leaving, together, again, mixed[:1]]


def largest_gap(model: Model, page: int, batches: list[list[dict]], outputs: list, engine: dict, chunk: int) -> float:
    """Of all tokens of ``batches_of``; that pages were found, and that the star masks matter, is checked besides."""
    pairs = [pair for batch in zip(batches, outputs, strict=True) for pair in zip(*batch, strict=True)]
    _, leaving, together, again, _ = ([output["cached"] for output in batch] for batch in outputs)
    assert leaving[-2:] == [4 * page] * 2 and again == [6 * page] * 3
    if "prefix_cache_retention_interval" in engine:
        assert leaving == [pages * page for pages in range(1, 5) for _ in range(2)]
        # Both in one step: the second finds what the first one writes in it.
        assert together == [0, page] or chunk <= page
    for prompt, output in pairs[3:6]:
        new = output["token_ids"]
        teeth = (model.logprobs(prompt, new) - model.logprobs(prompt, new, dense=True)).abs().max().item()
        assert teeth > 1000 * LIMIT
    return max(model.gap(prompt, output) for prompt, output in pairs)


@pytest.mark.parametrize(("family", "runner"), CASES)
def test_logprobs_are_those_of_the_reference(models, family, runner, record_property):
    model, page, engine = models[family], PAGES[family], RUNNERS[runner]
    batches = batches_of(page)
    outputs = run_engine(model.path, batches, **engine)["batches"]
    largest = largest_gap(model, page, batches, outputs, engine, engine["max_num_batched_tokens"])
    record_property("largest gap", f"{largest:.1e}")
    print(f"{family} {runner}: largest gap {largest:.1e}")
    assert largest <= LIMIT


@pytest.mark.parametrize("family", ["llama", "baichuan"])
def test_chunks_of_any_size(models, family, record_property):
    """One engine: whole prompts in a step, then 96, 7 and 1 tokens a step."""
    model, page, chunks = models[family], PAGES[family], (2048, 96, 7, 1)
    engine = DENSE | {"max_num_batched_tokens": 2048}
    runs = [batches_of(page, 100 * index) for index in range(len(chunks))]
    batches = [batch for chunk, run in zip(chunks, runs, strict=True) for batch in ({"chunk": chunk}, *run)]
    outputs = run_engine(model.path, batches, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, **engine)["batches"]
    for index, (chunk, run) in enumerate(zip(chunks, runs, strict=True)):
        part = outputs[index * len(run) :][: len(run)]
        largest = largest_gap(model, page, run, part, engine, chunk)
        record_property(f"largest gap in chunks of {chunk}", f"{largest:.1e}")
        print(f"{family} in chunks of {chunk}: largest gap {largest:.1e}")
        assert largest <= LIMIT


def test_an_adapter_of_every_projection(models, tmp_path):
    """LoRA, Baichuan's W_pack included, beside the base model."""
    model = models["baichuan"]
    adapted = model.adapted(tmp_path / "adapter")
    base = judged(random_ids(1, 150))
    lora = base | {"lora": str(tmp_path / "adapter")}
    sizes = {"max_num_batched_tokens": 96, "enable_lora": True, "max_lora_rank": RANK}
    # One after the other: vLLM's LoRA on CPU can't give the logprobs of two prompts in a step.
    (with_lora,), (without,) = run_engine(model.path, [[lora], [base]], **sizes)["batches"]
    assert adapted.gap(lora, with_lora) <= LIMIT
    assert model.gap(base, without) <= LIMIT
    assert model.gap(lora, with_lora) > 1000 * LIMIT


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


def test_tokens_proposed_and_refused(models):
    """Speculative decoding: the state of tokens that were refused is none of the next step's."""
    model = models["llama"]
    repeated = random_ids(1, 20)
    prompts = [judged(repeated * 5 + repeated[:7], max_tokens=32), judged(random_ids(2, 33), max_tokens=32)]
    proposals = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    result = run_engine(model.path, [prompts], max_num_batched_tokens=96, speculative_config=proposals)
    gaps = [model.gap(prompt, output) for prompt, output in zip(prompts, result["batches"][0], strict=True)]
    print(f"largest gap {max(gaps):.1e}, {result['metrics']}")
    assert max(gaps) <= LIMIT
    drafted, accepted = (result["metrics"][f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted


@pytest.mark.parametrize("engine", [{"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, {}], ids=["bf16-fp8", "float32"])
def test_the_oracle_retrieves_at_any_distance(tmp_path, engine):
    """Exactly: dense, star and from the cache. The state stays in the model's dtype beside an fp8 KV cache.

    The needle lies across a star block's border: what follows its first token is found only where the key of a block's
    first token holds the token before it, of the block before.
    """
    needle = list(range(300, 306))
    haystacks = [random_ids(40 + index, length) for index, length in enumerate((10, 700, FAR))]
    dense = [cached([*hay[:7], *needle, *hay[7:], needle[0]]) for hay in haystacks]
    far = [*haystacks[-1][: FAR // 2 - 1], *needle, *haystacks[-1][FAR // 2 - 1 :], needle[0]]
    prompts = [*dense, cached(far, star(FAR // 16, 1))]
    sizes = {"max_num_batched_tokens": 4001, "max_model_len": FAR + 32}
    outputs = run_engine(make_induction_oracle(tmp_path / "oracle"), [prompts, prompts], **engine | sizes)["batches"]
    for batch in outputs:
        assert [output["token_ids"] for output in batch] == [needle[1:]] * len(prompts)
    assert min(output["cached"] for output in outputs[1][-2:]) > FAR * 0.95
