"""An engine with ``star_adapter``, against plain torch on a checkpoint to which the adapter's weights are added."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from starling.lab.selftest.masks import star_mask
from tests.adapters import make_adapter, merged
from tests.parity.harness import TINY, max_gap, reference_logprobs, run_engine, star, v2_env
from tests.parity.test_documents import HEAD, LIMIT, A, B, C, D, E, Prompt, tokens_of

pytestmark = pytest.mark.engine

RUNNERS = {
    "v1": {"max_num_batched_tokens": 97},
    "v1-compiled": {"max_num_batched_tokens": 300, "enforce_eager": False},
    "v1-tp2": {"max_num_batched_tokens": 300, "tensor_parallel_size": 2},
    "v2": {"max_num_batched_tokens": 97, "env": v2_env()},
}
FIRST, AGAIN, SHORT = Prompt(HEAD, [A, B, C, D, E]), Prompt(HEAD, [D, B, A, C]), Prompt(HEAD[:20], [A, D])
OFF = {"star_adapter": "off"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Name -> (folder of an adapter, the checkpoint with it)."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "documents": {"seed": 1},
        "both": {"seed": 2, "rank": 8, "modules": ("q_proj", "o_proj"), "purposes": ["documents", "star"]},
        "own": {"seed": 3},
    }
    made = {name: make_adapter(folder / name, model, **kind) for name, kind in kinds.items()}
    return {name: (adapter, merged(folder / f"{name} merged", model, adapter)) for name, adapter in made.items()}


def check(checkpoint: Any, prompt: Prompt, output: dict[str, Any]) -> None:
    expected = prompt.expected(checkpoint, output["token_ids"])
    assert max_gap(output["logprobs"], expected[-len(output["token_ids"]) :]) <= LIMIT, checkpoint


@pytest.mark.parametrize("runner", RUNNERS)
def test_documents_run_with_it_and_others_without(model, adapters, runner):
    """Prompts of one step run with it, without it by choice, and dense; pages of the one are none of the others."""
    folder, with_it = adapters["documents"]
    dense = {"ids": tokens_of(7, 150), "extra_args": {}, "max_tokens": 4}
    blocks = dense | {"extra_args": star(64, 10)}
    together = [FIRST.request(), FIRST.request(extra_args=FIRST.request()["extra_args"] | OFF), dense, blocks]
    again = [AGAIN.request(), SHORT.request(), AGAIN.request(extra_args=AGAIN.request()["extra_args"] | OFF)]
    result = run_engine(model, [together, again], star={"star_adapter": str(folder)}, **RUNNERS[runner])["batches"]
    for checkpoint, prompt, output in (
        (with_it, FIRST, result[0][0]),
        (model, FIRST, result[0][1]),
        (with_it, AGAIN, result[1][0]),
        (with_it, SHORT, result[1][1]),
        (model, AGAIN, result[1][2]),
    ):
        check(checkpoint, prompt, output)
    expected = reference_logprobs(model, dense["ids"] + result[0][2]["token_ids"], None)
    assert max_gap(result[0][2]["logprobs"], expected[-4:]) <= LIMIT
    mask = star_mask(154, block_size=64, anchor_size=64, overlap_size=0, context_end=140)
    expected = reference_logprobs(model, dense["ids"] + result[0][3]["token_ids"], mask)
    assert max_gap(result[0][3]["logprobs"], expected[-4:]) <= LIMIT
    assert [output["cached"] for output in result[1]] == [len(AGAIN.ids) - AGAIN.computed(), 0, result[1][0]["cached"]]
    gap = (FIRST.expected(with_it, []) - FIRST.expected(model, [])).abs().max()
    assert gap > 1000 * LIMIT, "the adapter has to change something"


def test_an_adapter_for_both_and_a_lora_of_the_request_which_wins(model, adapters):
    folder, with_it = adapters["both"]
    own, with_own = adapters["own"]
    blocks = {"ids": tokens_of(7, 150), "extra_args": star(64, 10), "max_tokens": 4}
    named = FIRST.request(lora=str(own))
    batches = [[FIRST.request(), blocks, named], [AGAIN.request(lora=str(own)), AGAIN.request()]]
    engine = {"enable_lora": True, "max_lora_rank": 8, "max_num_batched_tokens": 97}
    result = run_engine(model, batches, star={"star_adapter": str(folder)}, **engine)["batches"]
    check(with_it, FIRST, result[0][0])
    check(with_own, FIRST, result[0][2])
    check(with_own, AGAIN, result[1][0])
    check(with_it, AGAIN, result[1][1])
    mask = star_mask(154, block_size=64, anchor_size=64, overlap_size=0, context_end=140)
    expected = reference_logprobs(with_it, blocks["ids"] + result[0][1]["token_ids"], mask)
    assert max_gap(result[0][1]["logprobs"], expected[-4:]) <= LIMIT
    assert {output["cached"] for output in result[1]} == {len(AGAIN.ids) - AGAIN.computed()}


def test_preempted_requests_give_the_same(model, adapters):
    folder, with_it = adapters["documents"]
    requests = [prompt.request(max_tokens=150) for prompt in (FIRST, AGAIN, SHORT)]
    sizes = {"num_gpu_blocks_override": 42, "max_model_len": 1024, "max_num_batched_tokens": 300}
    small = run_engine(model, [requests], star={"star_adapter": str(folder)}, **sizes)
    assert small["metrics"]["vllm:num_preemptions"] > 0
    for prompt, output in zip((FIRST, AGAIN, SHORT), small["batches"][0], strict=True):
        assert len(output["token_ids"]) == 150
        check(with_it, prompt, output)


def test_the_library_has_pages_of_it(model, adapters, tmp_path):
    """A second start finds the documents in files, and one with another adapter does not."""
    found = []
    for name in ("documents", "documents", "both"):
        options = {"star_adapter": str(adapters[name][0]), "star_library": f"{tmp_path}/pages:16MiB"}
        after = {"ids": tokens_of(5, 40), "extra_args": {}, "max_tokens": 1}
        batches = [[FIRST.request()], [after], [after], [after]]
        result = run_engine(model, batches, star=options, max_num_batched_tokens=97)["batches"]
        check(adapters[name][1], FIRST, result[0][0])
        found.append(result[0][0]["cached"])
    assert found == [0, len(FIRST.ids) - FIRST.computed(), 0]


def test_training_computes_what_the_engine_does(model, adapters):
    """The pass that `starling distil` trains with, against the same plain torch."""
    from peft import PeftConfig

    from starling.lab.distillation.adapted_model import AdaptedModel, make_rows
    from starling.lab.distillation.training import document_plan
    from starling.lab.evaluation.document_prompts import Asked, DocumentPrompt

    folder, with_it = adapters["documents"]
    config = PeftConfig.from_pretrained(folder)
    made = AdaptedModel(model, "cpu", torch.float32, config, recompute=True)
    made.load(folder)
    questions = [tokens_of(50 + number, 20) for number in range(3)]
    prompt = DocumentPrompt(
        "test",
        tuple(HEAD[:64]),
        tuple(map(tuple, (A, D, C))),
        tuple(Asked(tuple(question[:15]), tuple(question[15:])) for question in questions),
    )
    rows = make_rows(prompt.context, questions, document_plan(prompt))
    with torch.no_grad():
        found = made.log_probs(rows, adapter=True).split([20, 20, 20])
        dense = made.log_probs(make_rows(prompt.context, questions, None), adapter=False).split([20, 20, 20])
    for question, of_plan, of_dense in zip(questions, found, dense, strict=True):
        of_engine = Prompt(HEAD[:64], [A, D, C], question=question)
        for checkpoint, got, expected in (
            (with_it, of_plan, of_engine.expected(with_it, [])),
            (model, of_dense, reference_logprobs(model, of_engine.ids, None)),
        ):
            chosen = got[:-1].gather(1, torch.tensor(question[1:])[:, None])[:, 0]
            assert max_gap(chosen.tolist(), expected[-19:]) <= LIMIT, checkpoint
