"""Served Attamba against two independent models in plain torch: cut prompts, hits, preemption, ranks, runners.

Each with Star Attention beside: star prompts stand in the batches of the dense ones.
"""

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
from tests.parity.harness import max_gap, numbers, run_engine, star, v2_env

pytestmark = pytest.mark.engine

LIMIT, TEETH = 1e-4, 0.1
TINY = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "ssm_heads": 2,
    "ssm_inner": 32,
    "ssm_state_dim": 16,
    "max_position_embeddings": 4096,
}
# (P, L): chunks that end early in some layers, windows smaller and larger than a chunk, a page, and a star block.
SIZES = [(2, 128), (4, 5), (8, 16), (64, 1)]
# With as many layers as tokens a chunk, the last layer's boundaries come first: token 0 is one of them.
DEPTHS = {2: 2, 4: 4}
# Star blocks of whole pages, 16 P, and a smaller anchor; where a block is one page, none.
BLOCKS, ANCHORS = {2: 64, 4: 128, 8: 256, 64: 1024}, {2: 32, 4: 64, 8: 128, 64: 0}
LENGTHS = (700, 37, 1, 1300)
TOLD = ("starling:cache_states", "starling:cache_bytes", "starling:cache_capacity")  # metrics
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
        depth = DEPTHS.get(chunk, 3)
        return make_random_attamba(
            folder / name, token_chunk=chunk, leading_tokens=window, num_hidden_layers=depth, **TINY
        )

    return make


@functools.cache
def independent(model: Path):
    return load_attamba(model).double().eval()


@functools.cache
def checkpoint(model: Path) -> tuple[dict[str, torch.Tensor], dict]:
    weights = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    return weights, json.loads((model / "config.json").read_text())


def logprobs_of(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of each of ``ids[1:]``."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def wanted(model: Path, ids: list[int]) -> torch.Tensor:
    """Log-probability of each of ``ids[1:]``, in float64: in float32 the model itself is off by most of the limit."""
    with torch.no_grad():
        return logprobs_of(independent(model)(torch.tensor([ids]))[0], ids)


def wanted_star(model: Path, ids: list[int], options: dict, num_prompt_tokens: int) -> torch.Tensor:
    """The same under star, by the token-by-token reference."""
    sizes = numbers(options, num_prompt_tokens)
    assert not sizes.pop("overlap_size")
    return logprobs_of(reference.logits(*checkpoint(model), torch.tensor(ids), sizes), ids)


def prompts(lengths=LENGTHS, seed: int = 3, **options) -> list[dict]:
    tokens = random.Random(seed)
    common = {"prompt_logprobs": True, "max_tokens": 20} | options
    return [common | {"ids": [tokens.randrange(256) for _ in range(length)]} for length in lengths]


def check(model: Path, prompt: dict, output: dict) -> None:
    """The engine's own tokens, and where asked for the prompt's, have the model's logprobs.

    A star prompt's are far from dense ones wherever they are held against the reference.
    """
    generated = output["token_ids"]
    ids = prompt["ids"] + generated
    want = dense = wanted(model, ids)
    if prompt.get("extra_args"):
        want = wanted_star(model, ids, prompt["extra_args"], len(prompt["ids"]))
        assert (want - dense)[-len(generated) :].abs().max() > TEETH
    assert max_gap(output["logprobs"], want[-len(generated) :]) <= LIMIT
    if output["prompt_logprobs"]:  # a prompt of one token has none
        assert max_gap(output["prompt_logprobs"], want[: -len(generated)]) <= LIMIT


@pytest.mark.parametrize(("chunk", "window"), SIZES)
def test_prompts_and_hits(models, chunk, window):
    """A mixed batch in steps that cut chunks; then prompts that begin as one before, judged by what they generate.

    Star finds what star left, whatever dense left of block 0, and the reverse.
    """
    model, block, anchor = models(chunk, window), BLOCKS[chunk], ANCHORS[chunk]
    batch = prompts()
    length = 2 * block + 190
    first, second = prompts((length, length), extra_args=star(block, 37), seed=4)
    second |= {"extra_args": star(block, 37, anchor_size=anchor)}
    edges = (1025, 1300)
    again = {"max_tokens": 20, "prompt_logprobs": False}
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
    # vLLM's default keeps a window's pages where a prompt ends, and at no place before.
    engine = {"max_num_batched_tokens": 173, "prefix_cache_retention_interval": block}
    batches = [[*batch, first, second], *([hit | again] for hit, _, _ in hits)]
    result = run_engine(model, batches, **engine)["batches"]
    for prompt, output in zip(batches[0], result[0], strict=True):
        check(model, prompt, output)
    for (prompt, least, most), (output,) in zip(hits, result[1:], strict=True):
        check(model, prompt, output)
        assert least <= output["cached"] <= most


def test_the_two_references_agree(models):
    """The token-by-token definition, and the training form that the engine is held against."""
    model = models(8, 16)
    ids = prompts()[0]["ids"][:120]
    want = logprobs_of(reference.logits(*checkpoint(model), torch.tensor(ids)), ids)
    assert (want - wanted(model, ids)).abs().max() < 1e-9


@pytest.mark.parametrize("runner", RUNNERS)
def test_runners(models, runner):
    model, batch = models(4, 5), [*prompts((350, 90)), *prompts((350,), seed=4, extra_args=star(64, 37))]
    for prompt, output in zip(batch, run_engine(model, [batch], **RUNNERS[runner])["batches"][0], strict=True):
        check(model, prompt, output)


def test_preempted_requests_give_the_same(models):
    """Pages of the window go back after a prefill: what grows until they run out are the states."""
    model, lengths = models(4, 5), (60, 58, 163, 161, 155, 150)
    batch = [
        prompt | ({"extra_args": star(64, 15)} if len(prompt["ids"]) > 64 else {})
        for prompt in prompts(lengths, max_tokens=330)
    ]
    tight = run_engine(model, [batch], max_num_batched_tokens=64, num_gpu_blocks_override=26, max_model_len=512)
    assert tight["metrics"]["vllm:num_preemptions"] > 0
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    row, a_request = 2 * 64 * 4 * layers, 8 + (5 + 1) + (3 + 1)  # bytes of K|V in all layers; pages at 512 tokens
    told = {name: value for name, value in tight["metrics"].items() if name.startswith(TOLD)}
    assert told == {
        "starling:cache_bytes_per_token 0 full_attention": 17 * row / 64,
        "starling:cache_bytes_per_token 1 sliding_window": 17 * row / 16,
        "starling:cache_bytes_per_token 2 sliding_window": 17 * row / 32,
        "starling:cache_capacity_tokens compressed": int(26 / a_request * 512),
        "starling:cache_capacity_tokens uncompressed": 25 * 17,
        "starling:cache_states": 0,
    }
    for prompt, output in zip(batch, tight["batches"][0], strict=True):
        check(model, prompt, output)


def test_a_wrong_offset_is_seen(models):
    """The comparison has teeth: the same weights with other chunks are far off."""
    model = models(8, 16)
    ids = prompts()[0]["ids"][:300]
    weights, config = checkpoint(model)
    want = wanted(model, ids)
    for changed in ({"leading_tokens": 15}, {"token_chunk": 7}):
        got = logprobs_of(reference.logits(weights, config | changed, torch.tensor(ids)), ids)
        assert (got - want).abs().max() > 100 * LIMIT
