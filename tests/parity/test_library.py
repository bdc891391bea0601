"""Pages from the library give the results of computing them: behind holes, after a restart, in both model runners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_llama import make_random_llama
from tests.parity.harness import TINY, max_gap, run_engine, v2_env
from tests.parity.test_documents import HEAD, A, B, C, D, E, Prompt, check, tokens_of

pytestmark = pytest.mark.engine

HERE = "tests.parity.test_library"
FORGET, SETTLE = {"scheduler": f"{HERE}:forget"}, {"scheduler": f"{HERE}:settle"}
AFTER = {"ids": tokens_of(5, 40), "max_tokens": 2}  # vLLM begins to store what a step computed in the next step
RUNNERS = {"v1": None, "v2": v2_env()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


def forget(scheduler: Any) -> None:
    """Empty the engine's own prefix cache."""
    assert scheduler.reset_prefix_cache()


def settle(scheduler: Any) -> None:
    """Return once what has been stored is in files."""
    scheduler.connector.scheduler.manager.secondary_tiers[0].drain_jobs()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.bin"))


STEPS = [
    ("in another order", [Prompt(HEAD, [D, B, A, C])], [()]),
    ("behind one that is nowhere", [Prompt(HEAD, [E, A, B, C, D])], [(E,)]),
    ("two prompts at once", [Prompt(HEAD, [C, E, A]), Prompt(HEAD, [E, D, C])], [(), ()]),
    ("a second question", [Prompt(HEAD, [D, B], question=tokens_of(98, 17))], [()]),
]


@pytest.mark.parametrize("runner", RUNNERS)
def test_documents_are_found_in_host_memory_and_after_a_restart(model: Path, runner: str, tmp_path: Path) -> None:
    """Nothing is in the engine's own cache, so that what is not computed comes from the library."""
    engine = {"max_num_batched_tokens": 97, "env": RUNNERS[runner], "star": {"star_library": f"{tmp_path}:16MiB"}}
    first = Prompt(HEAD, [A, B, C, D])
    cold = [[prompt.request(cold=True)] for _, prompts, _ in STEPS for prompt in prompts]
    warm: list[Any] = []
    for _, prompts, _ in STEPS:
        warm += [FORGET, [prompt.request() for prompt in prompts], [AFTER]]
    began = run_engine(model, [[first.request()], [AFTER], *warm, SETTLE, *cold], **engine)["batches"]
    again = run_engine(model, warm, **engine)["batches"]
    expected = [output for (output,) in began[-len(cold) :]]
    for results, is_new in ((began[2:], True), (again, False)):
        alone = iter(expected)
        for (description, prompts, missing), outputs in zip(STEPS, results[::2], strict=False):
            for prompt, computed, output in zip(prompts, missing, outputs, strict=True):
                reference = next(alone)
                assert output["cached"] == len(prompt.ids) - prompt.computed(*(computed if is_new else ())), description
                assert output["token_ids"] == reference["token_ids"], description
                assert max_gap(output["logprobs"], torch.tensor(reference["logprobs"])) <= 1e-5, description
                check(model, prompt, output)
    assert len(files(tmp_path)) >= 18  # all of the documents, and the head
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}
