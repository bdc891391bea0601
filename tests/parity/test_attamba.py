"""Served Attamba against two independent models in plain torch: cut prompts, hits, preemption, ranks, runners."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attention_backends.attamba import reference
from benchmarks.random_attamba import make_random_attamba
from examples.attamba_model import load_attamba
from tests.parity.harness import max_gap, run_engine, v2_env

pytestmark = pytest.mark.engine

LIMIT = 1e-4
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "ssm_heads": 2,
    "ssm_inner": 32,
    "ssm_state_dim": 16,
    "max_position_embeddings": 4096,
}
# (P, L): chunks that end early in some layers, windows smaller and larger than a chunk, and than a page.
SIZES = [(2, 128), (4, 5), (8, 16), (64, 1)]
LENGTHS = (700, 37, 1, 1300)
RUNNERS = {
    "v1-tp2": {"max_num_batched_tokens": 96, "tensor_parallel_size": 2},
    "v2": {"max_num_batched_tokens": 300, "env": v2_env()},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(chunk: int, window: int) -> Path:
        name = f"attamba-{chunk}-{window}"
        return make_random_attamba(folder / name, token_chunk=chunk, leading_tokens=window, **TINY)

    return make


@functools.cache
def independent(model: Path):
    return load_attamba(model).double().eval()


def wanted(model: Path, ids: list[int]) -> torch.Tensor:
    """Log-probability of each of ``ids[1:]``, in float64: in float32 the model itself is off by most of the limit."""
    with torch.no_grad():
        logprobs = independent(model)(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def prompts(lengths=LENGTHS, **options) -> list[dict]:
    tokens = random.Random(3)
    common = {"prompt_logprobs": True, "max_tokens": 20} | options
    return [common | {"ids": [tokens.randrange(256) for _ in range(length)]} for length in lengths]


def check(model: Path, prompt: dict, output: dict) -> None:
    """The engine's own tokens, and where asked for the prompt's, have the model's logprobs."""
    generated = output["token_ids"]
    want = wanted(model, prompt["ids"] + generated)
    assert max_gap(output["logprobs"], want[-len(generated) :]) <= LIMIT
    if output["prompt_logprobs"]:  # a prompt of one token has none
        assert max_gap(output["prompt_logprobs"], want[: -len(generated)]) <= LIMIT


@pytest.mark.parametrize(("chunk", "window"), SIZES)
def test_prompts_and_hits(models, chunk, window):
    """A mixed batch in steps that cut chunks; then prompts that begin as one before, judged by what they generate."""
    model, batch = models(chunk, window), prompts()
    edges = (1025, 1300)
    hits = [{"ids": [*batch[3]["ids"][:edge], 1, 2, 3], "max_tokens": 20, "prompt_logprobs": False} for edge in edges]
    # vLLM's default keeps a window's pages where a prompt ends, and at no place before.
    engine = {"max_num_batched_tokens": 173, "prefix_cache_retention_interval": 1024}
    result = run_engine(model, [batch, *([hit] for hit in hits)], **engine)["batches"]
    for prompt, output in zip([*batch, *hits], [*result[0], *(each[0] for each in result[1:])], strict=True):
        check(model, prompt, output)
    assert [each[0]["cached"] >= 1024 for each in result[1:]] == [True] * len(hits)


def test_the_two_references_agree(models):
    """The token-by-token definition, and the training form that the engine is held against."""
    model = models(8, 16)
    weights = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    ids = prompts()[0]["ids"][:120]
    want = reference.logits(weights, json.loads((model / "config.json").read_text()), torch.tensor(ids))
    got = wanted(model, ids)
    assert (want[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - got).abs().max() < 1e-9


@pytest.mark.parametrize("runner", RUNNERS)
def test_runners(models, runner):
    model, batch = models(4, 5), prompts((350, 90))
    for prompt, output in zip(batch, run_engine(model, [batch], **RUNNERS[runner])["batches"][0], strict=True):
        check(model, prompt, output)


def test_preempted_requests_give_the_same(models):
    """Pages of the window go back after a prefill: what grows until they run out are the states."""
    model, batch = models(4, 5), prompts((60, 58, 63, 61, 55, 50), max_tokens=430)
    tight = run_engine(model, [batch], max_num_batched_tokens=64, num_gpu_blocks_override=26, max_model_len=512)
    assert tight["metrics"]["vllm:num_preemptions"] > 0
    for prompt, output in zip(batch, tight["batches"][0], strict=True):
        check(model, prompt, output)


def test_a_wrong_offset_is_seen(models):
    """The comparison has teeth: the same weights with other chunks are far off."""
    model = models(8, 16)
    ids = prompts()[0]["ids"][:300]
    weights = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    config = json.loads((model / "config.json").read_text())
    want = wanted(model, ids)
    for changed in ({"leading_tokens": 15}, {"token_chunk": 7}):
        got = reference.logits(weights, config | changed, torch.tensor(ids))[:-1].log_softmax(-1)
        got = got.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (got - want).abs().max() > 100 * LIMIT
