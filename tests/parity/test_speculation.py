"""Star Attention with speculative decoding: drafts behind star prompts, against the explicit mask."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, mask_of, max_gap, reference_logprobs, run_engine, star, star_sizes, v2_env

pytestmark = pytest.mark.engine

LIMIT = 1e-4
DRAFTS = 3
CASES = [
    (1003, star(256, 37)),
    (777, star(96, 130, anchor_size=32)),
    (645, star(160, 5, anchor_size=160, overlap_size=160)),
    (500, {}),
]


def make_eagle(target, folder):
    """An EAGLE head of one layer, whose embedding and layer are the target's, behind random weights that join them."""
    weights = load_file(target / "model.safetensors")
    kept = {name.removeprefix("model."): weight for name, weight in weights.items() if "layers.0." in name}
    del kept["layers.0.input_layernorm.weight"]  # the head has none
    kept["embed_tokens.weight"] = embedding = weights["model.embed_tokens.weight"]
    hidden = embedding.shape[1]
    kept["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(0)) / hidden
    folder.mkdir()
    save_file(kept, folder / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="module")
def methods(model, tmp_path_factory):
    """Name -> the configuration of a method of speculative decoding."""
    eagle = make_eagle(model, tmp_path_factory.mktemp("drafters") / "eagle")
    found = {
        "ngram": {"prompt_lookup_max": 2, "prompt_lookup_min": 1},
        "draft_model": {"model": str(model)},
        "eagle": {"model": str(eagle)},
    }
    return {name: {"method": name, "num_speculative_tokens": DRAFTS} | more for name, more in found.items()}


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    tokens = random.Random(7)
    return [
        {"ids": [tokens.randrange(256) for _ in range(length)], "extra_args": options, "max_tokens": 24}
        for length, options in CASES
    ]


def keep_clear_of_graphs(scheduler) -> None:
    """Cut chunks as where decodes run in full CUDA graphs."""
    scheduler.view.has_decode_graphs = True


def gap(model, prompt: dict, output: dict, masked: bool = True) -> float:
    """The largest distance of the output's log-probabilities from those of the prompt's mask, or of the causal one."""
    length = len(prompt["ids"])
    ids, options = prompt["ids"] + output["token_ids"], prompt["extra_args"]
    mask = mask_of(star_sizes(options, length), len(ids)) if options and masked else None
    return max_gap(output["logprobs"], reference_logprobs(model, ids, mask)[length - 1 :])


@pytest.mark.parametrize(
    ("method", "runner"),
    [("ngram", "v1"), ("draft_model", "v1"), ("eagle", "v1"), ("eagle", "v2")],
)
def test_generated_tokens_are_those_of_the_mask(model, methods, prompts, method, runner):
    """Chunked and batched, then from the cache, and then the same tokens with dense attention."""
    dense = [prompt | {"extra_args": {}} for prompt in prompts[:2]]
    env = {"v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "v2": v2_env()}[runner]
    batches = [prompts, prompts, dense]
    result = run_engine(model, batches, env=env, max_num_batched_tokens=300, speculative_config=methods[method])
    assert result["metrics"]["vllm:spec_decode_num_drafts"] > 0
    for batch, outputs in zip(batches, result["batches"], strict=True):
        for prompt, output in zip(batch, outputs, strict=True):
            assert gap(model, prompt, output) <= LIMIT
            if prompt["extra_args"]:
                assert gap(model, prompt, output, masked=False) > 100 * LIMIT
    again = zip(prompts, result["batches"][1], strict=True)
    assert all(output["cached"] > 0.8 * len(prompt["ids"]) for prompt, output in again)


def test_drafts_of_the_model_itself_are_accepted_and_preempted_requests_give_the_same(model, methods, prompts):
    """The KV cache is too small for the admitted requests: they are preempted while they decode, and resume."""
    longer = [prompt | {"max_tokens": 150} for prompt in prompts]
    few = {"num_gpu_blocks_override": 100, "max_model_len": 2048, "max_num_batched_tokens": 300}
    result = run_engine(model, [longer], speculative_config=methods["draft_model"], **few)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 150 // 2
    assert all(gap(model, prompt, output) <= LIMIT for prompt, output in zip(longer, result["batches"][0], strict=True))


def test_chunks_as_long_as_a_decode_with_drafts_are_cut(model, methods, prompts):
    """A step has four tokens, as a decode with three drafts. Where graphs are, a chunk in star blocks gets three."""
    prompt = prompts[1] | {"ids": prompts[1]["ids"][:300], "extra_args": star(64, 7, anchor_size=32)}
    graphs = {"scheduler": f"{__name__}:keep_clear_of_graphs"}
    result = run_engine(model, [graphs, {"chunk": 1 + DRAFTS}, [prompt]], speculative_config=methods["draft_model"])
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert gap(model, prompt, result["batches"][0][0]) <= LIMIT
