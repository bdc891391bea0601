"""KV shifting attention against the float32 reference: chunked prefill, prefix-cache hits and preemption."""

from __future__ import annotations

import pytest

from benchmarks.kv_shift.induction_oracle import make_induction_oracle
from benchmarks.kv_shift.random_model import TINY_BAICHUAN, TINY_LLAMA
from tests.parity.harness import NEEDS_FP8, run_engine, star, v2_env
from tests.parity.kv_shift_cases import RANK, Model, cached_prompt, random_ids, uncached_prompt

pytestmark = pytest.mark.engine

LIMIT = 1e-4
FAR = 32768
CONFIGS = {
    "llama": TINY_LLAMA,
    "baichuan": TINY_BAICHUAN,
    # In layers without a window both ranks hold the only KV head. In windowed layers each rank holds one of two heads.
    "baichuan-one-head": TINY_BAICHUAN | {"num_key_value_heads": 1},
}
# Page size of the full-attention layers. A token has two to four times as many bytes in Baichuan's windowed layers.
PAGE_SIZES = {"llama": 32, "baichuan": 64, "baichuan-one-head": 64}
# vLLM's default keeps the states of few pages in the prefix cache. This option keeps the states of all pages.
KEEP_ALL = {"prefix_cache_retention_interval": None}
# Chunks end at borders of pages and inside pages. Small prompts run in the same step.
RUNNERS = {
    "v1-compiled": {"max_num_batched_tokens": 2048, "enforce_eager": False},
    "v1-tp2": KEEP_ALL | {"max_num_batched_tokens": 23, "max_num_seqs": 4, "tensor_parallel_size": 2},
    "v2": KEEP_ALL | {"max_num_batched_tokens": 96, "env": v2_env()},
}
CASES = [("llama", "v1-compiled"), ("baichuan-one-head", "v1-tp2"), ("llama", "v2"), ("baichuan", "v2")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Model.random(folder / name, config) for name, config in CONFIGS.items()}


def star_options(page_size: int) -> list[dict]:
    return [
        star(2 * page_size, 7),
        star(2 * page_size, 20, anchor_size=page_size),
        star(page_size, 1, anchor_size=page_size, overlap_size=page_size),
    ]


def make_batches(page_size: int, seed: int = 0) -> list[list[dict]]:
    """Batches to run one after the other: mixed lengths and masks, then prompts that hit pages of earlier prompts."""
    first, common = random_ids(seed + 1, 4 * page_size + 9), random_ids(seed + 2, page_size)
    mixed = [uncached_prompt(ids) for ids in (first, random_ids(seed + 3, 75), random_ids(seed + 4, 1))]
    starred = [
        uncached_prompt(random_ids(seed + 5 + index, 6 * page_size + 5), options)
        for index, options in enumerate(star_options(page_size))
    ]
    # Prefixes that end at the border of each page, and inside the next page.
    prefixes = [
        cached_prompt(first[: num_pages * page_size + inside] + random_ids(seed + 10 + num_pages, 3 + num_pages))
        for num_pages in range(1, 5)
        for inside in (0, 5)
    ]
    together = [cached_prompt(common + random_ids(seed + 20 + length, length)) for length in (3, 5)]
    repeated = [cached_prompt(prompt["ids"], prompt["extra_args"]) for prompt in starred]
    return [mixed + starred, prefixes, together, repeated, mixed[:1]]


def largest_gap(
    model: Model, page_size: int, batches: list[list[dict]], outputs: list, engine: dict, chunk_size: int
) -> float:
    """The largest gap of all tokens of ``make_batches``. Asserts the cache hits, and that star masks have an effect."""
    pairs = [pair for batch in zip(batches, outputs, strict=True) for pair in zip(*batch, strict=True)]
    _, prefixes, together, repeated, _ = ([output["cached"] for output in batch] for batch in outputs)
    assert prefixes[-2:] == [4 * page_size] * 2 and repeated == [6 * page_size] * 3
    if "prefix_cache_retention_interval" in engine:
        assert prefixes == [num_pages * page_size for num_pages in range(1, 5) for _ in range(2)]
        # Both prompts run in one step: the second prompt hits the page that the first prompt writes in that step.
        assert together == [0, page_size] or chunk_size <= page_size
    for prompt, output in pairs[3:6]:
        new = output["token_ids"]
        mask_effect = (model.logprobs(prompt, new) - model.logprobs(prompt, new, dense=True)).abs().max().item()
        assert mask_effect > 1000 * LIMIT
    return max(model.gap(prompt, output) for prompt, output in pairs)


@pytest.mark.parametrize(("family", "runner"), CASES)
def test_logprobs_are_those_of_the_reference(models, family, runner, record_property):
    model, page_size, engine = models[family], PAGE_SIZES[family], RUNNERS[runner]
    batches = make_batches(page_size)
    outputs = run_engine(model.path, batches, **engine)["batches"]
    largest = largest_gap(model, page_size, batches, outputs, engine, engine["max_num_batched_tokens"])
    record_property("largest gap", f"{largest:.1e}")
    print(f"{family} {runner}: largest gap {largest:.1e}")
    assert largest <= LIMIT


@pytest.mark.parametrize(("family", "chunk_sizes"), [("llama", (2048, 96, 7, 1)), ("baichuan", (2048, 96, 7))])
def test_chunks_of_any_size(models, family, chunk_sizes, record_property):
    """One engine: whole prompts in a step, then smaller chunks. Baichuan's pages are large: no chunks of one token."""
    model, page_size = models[family], PAGE_SIZES[family]
    engine = KEEP_ALL | {"max_num_batched_tokens": 2048}
    runs = [make_batches(page_size, 100 * index) for index in range(len(chunk_sizes))]
    batches = [batch for size, run in zip(chunk_sizes, runs, strict=True) for batch in ({"chunk": size}, *run)]
    outputs = run_engine(model.path, batches, **engine)["batches"]
    for index, (size, run) in enumerate(zip(chunk_sizes, runs, strict=True)):
        part = outputs[index * len(run) :][: len(run)]
        largest = largest_gap(model, page_size, run, part, engine, size)
        record_property(f"largest gap in chunks of {size}", f"{largest:.1e}")
        print(f"{family} in chunks of {size}: largest gap {largest:.1e}")
        assert largest <= LIMIT


def test_an_adapter_of_every_projection(models, tmp_path):
    """LoRA, including Baichuan's W_pack, and the base model on the same engine."""
    model = models["baichuan"]
    adapted = model.adapted(tmp_path / "adapter")
    base = uncached_prompt(random_ids(1, 150))
    lora = base | {"lora": str(tmp_path / "adapter")}
    sizes = {"max_num_batched_tokens": 96, "enable_lora": True, "max_lora_rank": RANK}
    # One prompt per batch: vLLM's LoRA on CPU does not support the logprobs of two prompts in a step.
    (with_lora,), (without,) = run_engine(model.path, [[lora], [base]], **sizes)["batches"]
    assert adapted.gap(lora, with_lora) <= LIMIT
    assert model.gap(base, without) <= LIMIT
    assert model.gap(lora, with_lora) > 1000 * LIMIT


@pytest.mark.parametrize(("family", "num_blocks"), [("llama", 18), ("baichuan", 25)])
def test_preempted_requests_and_a_state_that_is_lost(models, family, num_blocks):
    """In a small cache requests are preempted and resume. The comparison fails without the state."""
    model, page_size = models[family], PAGE_SIZES[family]
    lengths = [page_size // 2 + 7 * index for index in range(4)]
    # Resumed cached prompts hit their own pages. Uncached prompts may not read the cache.
    kinds = [uncached_prompt, cached_prompt, uncached_prompt, cached_prompt]
    prompts = [
        kind(random_ids(20 + length, length), max_tokens=4 * page_size)
        for kind, length in zip(kinds, lengths, strict=True)
    ]
    sizes = {"max_num_batched_tokens": 48, "max_model_len": 6 * page_size, "num_gpu_blocks_override": num_blocks}
    batches = [prompts, {"call": "tests.parity.kv_shift_cases:zero_state"}, prompts[:1]]
    result = run_engine(model.path, batches, **sizes)
    right, wrong = result["batches"]
    largest = max(model.gap(prompt, output) for prompt, output in zip(prompts, right, strict=True))
    print(f"{family}: {result['metrics']['vllm:num_preemptions']} preemptions, largest gap {largest:.1e}")
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert largest <= LIMIT
    assert model.gap(prompts[0], wrong[0]) > 1000 * LIMIT


def test_tokens_proposed_and_rejected(models):
    """Speculative decoding: a step does not read the state of tokens that were rejected before it, star or dense."""
    model = models["llama"]
    repeated = random_ids(1, 20)
    prompts = [uncached_prompt(ids, max_tokens=32) for ids in (repeated * 5 + repeated[:7], random_ids(2, 33))]
    prompts.append(uncached_prompt(random_ids(3, 200), star(64, 7), max_tokens=32))
    proposals = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    result = run_engine(model.path, [prompts], max_num_batched_tokens=96, speculative_config=proposals)
    gaps = [model.gap(prompt, output) for prompt, output in zip(prompts, result["batches"][0], strict=True)]
    print(f"largest gap {max(gaps):.1e}, {result['metrics']}")
    assert max(gaps) <= LIMIT
    drafted, accepted = (result["metrics"][f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    "engine",
    [pytest.param({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, marks=NEEDS_FP8), {}],
    ids=["bf16-fp8", "float32"],
)
def test_the_oracle_retrieves_at_any_distance(tmp_path, engine):
    """Retrieval is exact: dense, star and from the cache. The first candidates are 20 ahead, so no rounding matters.

    With an fp8 KV cache the state has the model's dtype.

    In the star prompt the needle crosses the border of two star blocks. The model finds the token after the needle's
    first token only if the key of a block's first token encodes the last token of the previous block.
    """
    needle = list(range(300, 306))
    haystacks = [random_ids(40 + index, length) for index, length in enumerate((10, 700, FAR))]
    dense = [cached_prompt([*hay[:7], *needle, *hay[7:], needle[0]]) for hay in haystacks]
    far = [*haystacks[-1][: FAR // 2 - 1], *needle, *haystacks[-1][FAR // 2 - 1 :], needle[0]]
    prompts = [*dense, cached_prompt(far, star(FAR // 16, 1))]
    sizes = {"max_num_batched_tokens": 4001, "max_model_len": FAR + 32, "kv_cache_memory_bytes": 1 << 30}
    outputs = run_engine(make_induction_oracle(tmp_path / "oracle"), [prompts, prompts], **engine | sizes)["batches"]
    for batch in outputs:
        assert [output["token_ids"] for output in batch] == [needle[1:]] * len(prompts)
    assert min(output["cached"] for output in outputs[1][-2:]) > FAR * 0.95
