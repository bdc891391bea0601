"""Served Attamba against two independent models in plain torch: chunked prefill, hits, preemption, ranks, runners.

Each test also covers Star Attention: batches mix star and dense prompts.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.attamba.random_model import make_random_attamba
from examples.attamba_model import load_attamba
from tests.parity.harness import max_gap, run_engine, star, star_sizes, v2_env
from tests.references import attamba as reference

pytestmark = pytest.mark.engine

LIMIT, MIN_MASK_EFFECT = 1e-4, 0.1
TINY = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "ssm_heads": 2,
    "ssm_inner": 32,
    "ssm_state_dim": 16,
    "max_position_embeddings": 4096,
}
# (P, L): chunks that end early in some layers; windows smaller and larger than a chunk, a page and a star block.
SIZES = [(2, 128), (4, 5), (8, 16), (64, 1)]
# With as many layers as tokens per chunk, token 0 is a boundary of the last layer.
DEPTHS = {2: 2, 4: 4}
# Star blocks of whole pages (16 P), and a smaller anchor; no anchor where a block is one page.
BLOCKS, ANCHORS = {2: 64, 4: 128, 8: 256, 64: 1024}, {2: 32, 4: 64, 8: 128, 64: 0}
LENGTHS = (700, 37, 1, 1300)
CACHE_METRICS = ("starling:cache_states", "starling:cache_bytes", "starling:cache_capacity")
RUNNERS = {
    "v1-tp2": {"max_num_batched_tokens": 96, "tensor_parallel_size": 2},
    "v2": {"max_num_batched_tokens": 300, "env": v2_env()},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(chunk_size: int, window: int) -> Path:
        path = folder / f"attamba-{chunk_size}-{window}"
        sizes = {"token_chunk": chunk_size, "leading_tokens": window}
        return make_random_attamba(path, num_hidden_layers=DEPTHS.get(chunk_size, 3), **sizes, **TINY)

    return make


@functools.cache
def training_model(model: Path):
    return load_attamba(model).double().eval()


@functools.cache
def checkpoint(model: Path) -> tuple[dict[str, torch.Tensor], dict]:
    weights = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    return weights, json.loads((model / "config.json").read_text())


def logprobs(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Log-probability of each of ``ids[1:]``."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def dense_logprobs(model: Path, ids: list[int]) -> torch.Tensor:
    """Log-probability of each of ``ids[1:]``, in float64: in float32 the error would use up most of LIMIT."""
    with torch.no_grad():
        return logprobs(training_model(model)(torch.tensor([ids]))[0], ids)


def star_logprobs(model: Path, ids: list[int], options: dict, num_prompt_tokens: int) -> torch.Tensor:
    """Log-probability of each of ``ids[1:]`` under Star Attention, by the token-by-token reference."""
    sizes = star_sizes(options, num_prompt_tokens)
    assert not sizes.pop("overlap_size")
    return logprobs(reference.logits(*checkpoint(model), torch.tensor(ids), sizes), ids)


def prompts(lengths=LENGTHS, seed: int = 3, **options) -> list[dict]:
    tokens = random.Random(seed)
    common = {"prompt_logprobs": True, "max_tokens": 20} | options
    return [common | {"ids": [tokens.randrange(256) for _ in range(length)]} for length in lengths]


def check(model: Path, prompt: dict, output: dict) -> None:
    """Assert that the generated tokens, and the prompt's tokens if requested, have the reference's logprobs.

    Also asserts that the reference's logprobs of a star prompt differ from dense ones.
    """
    generated = output["token_ids"]
    ids = prompt["ids"] + generated
    expected = dense = dense_logprobs(model, ids)
    if prompt.get("extra_args"):
        expected = star_logprobs(model, ids, prompt["extra_args"], len(prompt["ids"]))
        assert (expected - dense)[-len(generated) :].abs().max() > MIN_MASK_EFFECT
    assert max_gap(output["logprobs"], expected[-len(generated) :]) <= LIMIT
    if output["prompt_logprobs"]:  # a prompt of one token has none
        assert max_gap(output["prompt_logprobs"], expected[: -len(generated)]) <= LIMIT


@pytest.mark.parametrize(("chunk_size", "window"), SIZES)
def test_prompts_and_hits(models, chunk_size, window):
    """A mixed batch in steps that cut chunks, then prompts with the prefix of an earlier prompt.

    The later prompts are compared by their generated tokens. Star prompts hit the pages of star prompts, and star and
    dense prompts hit each other's pages of block 0.
    """
    model, block, anchor = models(chunk_size, window), BLOCKS[chunk_size], ANCHORS[chunk_size]
    # With this draw torch has an error of 3e-5 in float32. With others it has more than LIMIT, in a single token.
    batch = prompts(seed=13)
    length = 2 * block + 190
    first, second = prompts((length, length), extra_args=star(block, 37), seed=4)
    second |= {"extra_args": star(block, 37, anchor_size=anchor)}
    edges = (1025, 1300)
    read_cache = {"max_tokens": 20, "prompt_logprobs": False}
    full = (length - 1) // block * block
    hits = [({"ids": [*batch[3]["ids"][:edge], 1, 2, 3]}, 1024, edge) for edge in edges]
    hits += [
        (first, full, length),
        (first | {"extra_args": None}, block, block),
        (first, full, length),
        (second | {"extra_args": first["extra_args"]}, block, block),
        ({"ids": batch[3]["ids"], "extra_args": second["extra_args"]}, block, block),
        (batch[3], 1024, 1300),
    ]
    # By default vLLM keeps the pages of a window only at the end of a prompt.
    engine = {"max_num_batched_tokens": 173, "prefix_cache_retention_interval": block}
    batches = [[*batch, first, second], *([hit | read_cache] for hit, _, _ in hits)]
    result = run_engine(model, batches, **engine)["batches"]
    for prompt, output in zip(batches[0], result[0], strict=True):
        check(model, prompt, output)
    for (prompt, min_cached, max_cached), (output,) in zip(hits, result[1:], strict=True):
        check(model, prompt, output)
        assert min_cached <= output["cached"] <= max_cached


def test_the_two_references_agree(models):
    """The token-by-token reference and the training model give the same logprobs."""
    model = models(8, 16)
    ids = prompts()[0]["ids"][:120]
    expected = logprobs(reference.logits(*checkpoint(model), torch.tensor(ids)), ids)
    assert (expected - dense_logprobs(model, ids)).abs().max() < 1e-9


@pytest.mark.parametrize("runner", RUNNERS)
def test_runners(models, runner):
    model, batch = models(4, 5), [*prompts((350, 90)), *prompts((350,), seed=4, extra_args=star(64, 37))]
    for prompt, output in zip(batch, run_engine(model, [batch], **RUNNERS[runner])["batches"][0], strict=True):
        check(model, prompt, output)


def test_the_kernels_of_gpus(models):
    """Prefill in chunks, mixed steps and decode, by interpreted Triton kernels and on the model runner of GPUs."""
    model, short = models(4, 5), {"max_tokens": 5}  # each ends a chunk while it decodes
    batch = [*prompts((21, 9, 1), **short), *prompts((100,), seed=4, extra_args=star(64, 15), **short)]
    calls = [{"call": f"tests.parity.attamba_kernels:{name}"} for name in ("use_kernels", "check_kernels")]
    result = run_engine(model, [calls[0], batch, calls[1]], max_num_batched_tokens=64, env=v2_env())
    for prompt, output in zip(batch, result["batches"][0], strict=True):
        check(model, prompt, output)


def test_compiled(models):
    """By default vLLM compiles the model on CPU. The attention of each layer is one op that it does not look into."""
    model, batch = models(4, 5), [*prompts((350, 90)), *prompts((350,), seed=4, extra_args=star(64, 37))]
    for prompt, output in zip(batch, run_engine(model, [batch], enforce_eager=False)["batches"][0], strict=True):
        check(model, prompt, output)


def test_preempted_requests_give_the_same(models):
    """Pages of the window are freed after the prefill. The states grow until no page is free."""
    model, lengths = models(4, 5), (60, 58, 163, 161, 155, 150)
    batch = [
        prompt | ({"extra_args": star(64, 15)} if len(prompt["ids"]) > 64 else {})
        for prompt in prompts(lengths, max_tokens=330)
    ]
    result = run_engine(model, [batch], max_num_batched_tokens=64, num_gpu_blocks_override=26, max_model_len=512)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    row_bytes = 2 * 64 * 4 * layers  # K|V of all layers
    request_pages = 8 + (5 + 1) + (5 + 1)  # of a request of 512 tokens
    metrics = {name: value for name, value in result["metrics"].items() if name.startswith(CACHE_METRICS)}
    assert metrics == {
        "starling:cache_bytes_per_token 0 full_attention": 17 * row_bytes / 64,
        "starling:cache_bytes_per_token 1 sliding_window": 17 * row_bytes / 16,
        "starling:cache_bytes_per_token 2 sliding_window": 17 * row_bytes / 16,
        "starling:cache_capacity_tokens compressed": int(26 / request_pages * 512),
        "starling:cache_capacity_tokens uncompressed": 25 * 17,
        "starling:cache_states": 0,
    }
    for prompt, output in zip(batch, result["batches"][0], strict=True):
        check(model, prompt, output)


def test_other_sizes_give_other_logprobs(models):
    """The comparison is sensitive: the same weights with another chunk size or window are far off."""
    model = models(8, 16)
    ids = prompts()[0]["ids"][:300]
    weights, config = checkpoint(model)
    expected = dense_logprobs(model, ids)
    for changed in ({"leading_tokens": 15}, {"token_chunk": 7}):
        got = logprobs(reference.logits(weights, config | changed, torch.tensor(ids)), ids)
        assert (got - expected).abs().max() > 100 * LIMIT
