"""KV heads that see everything beside heads that see star blocks, against explicit masks for each head.

The scores of the random model are random too, so layers have no, some or only dense heads, and shares of 0.25 and 0.5
stand in one batch.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_llama import byte_tokenizer, make_random_llama
from tests.parity.harness import (
    load_reference,
    mask_of,
    max_gap,
    reference_logprobs,
    run_engine,
    star,
    star_sizes,
    v2_env,
)

pytestmark = pytest.mark.engine

LIMIT = 1e-4
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
SCORES = [[0.1, 0.9, 0.2, 0.8], [0.0, -0.1, 0.3, 0.05], [0.7, 0.6, 0.5, 0.4]]
"""At a share of 0.5, layer 0 has two dense heads, layer 1 none, and layer 2 dense heads only."""
DENSE = {
    0: [],
    0.25: [(0, 1), (0, 3), (2, 0)],
    0.5: [(0, 1), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)],
    1: [(layer, head) for layer in range(3) for head in range(4)],
}
# (tokens, options): a dense prompt, plans without dense heads, and plans with three numbers of them.
CASES = [
    (803, star(256, 37) | {"star_dense_heads": 0.25}),
    (777, star(96, 130, anchor_size=32)),
    (950, star(128, 1, anchor_size=64, overlap_size=64) | {"star_dense_heads": 0.5}),
    (500, {}),
    (520, star(64, 3, anchor_size=0) | {"star_dense_heads": 0.25}),
    (400, star(64, 9) | {"star_dense_heads": 1}),
]
RUNNERS = {
    "v1": {"max_num_batched_tokens": 300},
    "v1-one-request-a-step": {"max_num_batched_tokens": 97, "max_num_seqs": 1},
    "v1-compiled": {"max_num_batched_tokens": 300, "enforce_eager": False},
    "v1-tp2": {"max_num_batched_tokens": 300, "tensor_parallel_size": 2},
    "v2": {"max_num_batched_tokens": 300, "env": v2_env()},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> dict:
    """The engine's option with the file of scores."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    path.write_text(json.dumps({"scores": SCORES}))
    return {"star_heads": str(path)}


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    tokens = random.Random(5)
    return [
        {"ids": [tokens.randrange(256) for _ in range(length)], "extra_args": options, "prompt_logprobs": True}
        for length, options in CASES
    ]


def expected_of(model, ids: list[int], options: dict):
    mask = mask_of(star_sizes(options, len(ids)), len(ids)) if options else None
    return reference_logprobs(model, ids, mask, dense_heads=DENSE[options.get("star_dense_heads", 0)])


@pytest.fixture(scope="module")
def expected(model, prompts) -> list:
    return [expected_of(model, prompt["ids"], prompt["extra_args"]) for prompt in prompts]


def test_dense_heads_make_another_result_than_star_and_dense_attention(model, prompts, expected):
    for prompt, logprobs in zip(prompts, expected, strict=True):
        options = prompt["extra_args"]
        share = options.get("star_dense_heads", 0)
        without = {name: value for name, value in options.items() if name != "star_dense_heads"}
        gaps = [max_gap(logprobs.tolist(), expected_of(model, prompt["ids"], other)) for other in ({}, without)]
        if share in (0.25, 0.5):
            assert min(gaps) > 100 * LIMIT
        elif share == 1:
            assert gaps[0] <= LIMIT


@pytest.mark.parametrize("runner", RUNNERS)
def test_prompt_logprobs_are_those_of_the_masks(model, prompts, expected, heads, runner):
    """All prompts run in one batch, and the first two also alone."""
    batches = [prompts, *([prompt] for prompt in prompts[:2])]
    result = run_engine(model, batches, star=heads, **RUNNERS[runner])
    got = result["batches"][0] + [batch[0] for batch in result["batches"][1:]]
    for output, logprobs in zip(got, [*expected, *expected[:2]], strict=True):
        assert max_gap(output["prompt_logprobs"], logprobs) <= LIMIT


def test_each_op_gives_those_of_the_masks(model, prompts, expected, heads):
    """Starling's op computes all heads in one call, vLLM's each run of heads of one kind."""
    starling, vllm = ({"call": f"tests.parity.cpu_ops:use_{name}"} for name in ("starlings", "vllms"))
    few = prompts[:3]
    check = {"call": "tests.parity.cpu_ops:check_vllms"}
    result = run_engine(model, [starling, few, vllm, few, check], star=heads, max_num_batched_tokens=300)
    for batch in result["batches"]:
        for output, logprobs in zip(batch, expected, strict=False):
            assert max_gap(output["prompt_logprobs"], logprobs) <= LIMIT


def random_ids(seed: int, length: int) -> list[int]:
    tokens = random.Random(seed)
    return [tokens.randrange(256) for _ in range(length)]


def turn(ids: list[int], options: dict, max_tokens: int = 4) -> dict:
    return {"ids": ids, "extra_args": options, "max_tokens": max_tokens}


QUARTER, HALF = (star(128, 37) | {"star_dense_heads": share} for share in (0.25, 0.5))
FIRST, SECOND = random_ids(1, 900), random_ids(2, 700)
NEXT_TURN = FIRST + random_ids(3, 200)
PAGE = 32
TURNS = [
    ("cold", turn(FIRST, QUARTER), 0),
    ("again: all", turn(FIRST, QUARTER), 899 // PAGE * PAGE),
    ("a larger share: block 0", turn(FIRST, HALF), 128),
    ("no dense heads: block 0", turn(FIRST, star(128, 37)), 128),
    ("dense: block 0", turn(FIRST, {}), 128),
    ("the next turn: the whole context", turn(NEXT_TURN, QUARTER), (900 - 37) // PAGE * PAGE),
]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_cache_hits_are_those_of_the_same_heads(model, heads, runner):
    """Each turn's generated tokens are held against the masks, and its hits against those that are possible."""
    env = {"v1": None, "v2": v2_env()}[runner]
    result = run_engine(model, [[step] for _, step, _ in TURNS], star=heads, max_num_batched_tokens=300, env=env)
    for (description, step, cached), (output,) in zip(TURNS, result["batches"], strict=True):
        assert output["cached"] == cached, description
        check_output(model, step, output)


def check_output(model, step: dict, output: dict) -> None:
    """The log-probabilities of generated tokens: the sizes of a plan are those of its prompt."""
    ids, options = step["ids"] + output["token_ids"], step["extra_args"]
    mask = mask_of(star_sizes(options, len(step["ids"])), len(ids)) if options else None
    expected = reference_logprobs(model, ids, mask, dense_heads=DENSE[options.get("star_dense_heads", 0)])
    assert max_gap(output["logprobs"], expected[-len(output["token_ids"]) :]) <= LIMIT


def test_preempted_requests_give_the_same(model, heads):
    """The KV cache is too small for the admitted requests: they are preempted while they decode, and resume."""
    batch = [turn(FIRST, QUARTER, 120), turn(SECOND, HALF, 120), turn(random_ids(4, 600), {}, 120)]
    sizes = {"max_num_batched_tokens": 300, "num_gpu_blocks_override": 74, "max_model_len": 1216}
    result = run_engine(model, [batch], star=heads, **sizes)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    for step, output in zip(batch, result["batches"][0], strict=True):
        check_output(model, step, output)


def test_drafts_of_speculative_decoding_are_verified_by_the_same_heads(model, heads):
    """Drafts repeat the prompt, and a prompt of one repeated text has many that are right."""
    steps = [turn(random_ids(5, 60) * 10, QUARTER, 24), turn(SECOND, HALF, 24)]
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    result = run_engine(model, [steps], star=heads, max_num_batched_tokens=300, speculative_config=drafting)
    assert result["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0
    for step, output in zip(steps, result["batches"][0], strict=True):
        check_output(model, step, output)


WINDOW = 100


def make_windowed(path: Path, kinds: str) -> Path:
    """A random OLMo 3 with a layer for each of ``kinds``, W with a window or F without, and its reference's windows."""
    import transformers

    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 256}
    names = {"W": "sliding_attention", "F": "full_attention"}
    layers = {"layer_types": [names[kind] for kind in kinds], "num_hidden_layers": len(kinds), "sliding_window": WINDOW}
    config = transformers.Olmo3Config(**sizes | layers | {"vocab_size": 320, "eos_token_id": 256, "pad_token_id": None})
    torch.manual_seed(0)
    transformers.Olmo3ForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)

    def with_window(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        places = torch.arange((args[0] if args else options["hidden_states"]).shape[1])
        in_window = (places[None] <= places[:, None]) & (places[None] > places[:, None] - WINDOW)
        bias = torch.zeros(in_window.shape).masked_fill(~in_window, torch.finfo(torch.float32).min)
        return args, options | {"attention_mask": bias[None, None]}

    for kind, layer in zip(kinds, load_reference(path, torch.float32).get_decoder().layers, strict=True):
        if kind == "W":
            layer.self_attn.register_forward_pre_hook(with_window, with_kwargs=True)
    return path


@pytest.mark.parametrize("kinds", ["WF", "FFW"])
def test_layers_with_a_window_keep_it_beside_layers_with_dense_heads(tmp_path, kinds):
    """A layer with a window has no scores. Two full layers beside one with a window have pages of their own."""
    model = make_windowed(tmp_path / "model", kinds)
    of_layer = [[0.1, 0.4, 0.3, 0.2][layer:] + [0.1, 0.4, 0.3, 0.2][:layer] for layer in range(len(kinds))]
    scores = [row if kind == "F" else [] for kind, row in zip(kinds, of_layer, strict=True)]
    (tmp_path / "scores.json").write_text(json.dumps({"scores": scores}))
    dense = [(layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row) if score >= 0.3]
    ids, options = random_ids(6, 500), star(128, 37) | {"star_dense_heads": 0.5}
    prompt = {"ids": ids, "extra_args": options, "prompt_logprobs": True}
    heads = {"star_heads": str(tmp_path / "scores.json")}
    result = run_engine(model, [[prompt]], star=heads, max_num_batched_tokens=300)
    mask = mask_of(star_sizes(options, len(ids)), len(ids))
    expected = reference_logprobs(model, ids, mask, dense_heads=dense)
    assert max_gap(result["batches"][0][0]["prompt_logprobs"], expected) <= LIMIT
    star_alone = reference_logprobs(model, ids, mask)
    assert max_gap(expected.tolist(), star_alone) > 100 * LIMIT
