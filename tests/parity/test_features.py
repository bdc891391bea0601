"""Engines without features, and with each one alone taken out, answer as the whole one does."""

from __future__ import annotations

import json

import pytest

from benchmarks.random_llama import make_random_llama
from starling.features import FEATURES
from tests.forks import run_in_fork
from tests.parity.engine_job import RESULT
from tests.parity.harness import OF_ENGINES, TINY, cores

OF_THE_CORE = {"BlockPadding", "PlanChunks", "Provenance"}
HOOKS = {
    "replicas": {"SplitPrompts", "PrefixHits"},
    "fairness": {"PrefillLimiter"},
    "retention": {"RetainedPages"},
    "reuse": {"BlockReuse", "CachedTokens"},
    "live": {"LiveRequests"},
}
"""The classes of a feature's hooks in the core, in an engine without replicas, a library or an adapter."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="module")
def answer(model):
    """Returns what an engine with these features answers."""

    def answer(names) -> dict:
        with cores(1) as bound:
            env = {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            done = run_in_fork(
                "tests.parity.features_job:main", str(model), json.dumps(list(names)), imports=OF_ENGINES, env=env
            )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
        return json.loads(line.removeprefix(RESULT))

    return answer


@pytest.fixture(scope="module")
def whole(answer):
    return answer(FEATURES)


@pytest.mark.engine
def test_the_whole_engine_has_a_plan_for_each_prompt(whole):
    plans = {name: found["plan"] for name, found in whole["answers"].items()}
    assert [plans[name]["attention"] for name in plans] == ["dense", "star", "star", "star"]
    assert plans["documents"]["documents"] and plans["dense heads"]["dense_heads"]
    assert len({tuple(found["logprobs"]) for found in whole["answers"].values()}) == len(plans)


@pytest.mark.engine
@pytest.mark.parametrize("out", [(feature,) for feature in FEATURES] + [FEATURES], ids=lambda out: "-".join(out))
def test_an_engine_without_features_answers_as_the_whole_one(out, whole, answer):
    found = answer(feature for feature in FEATURES if feature not in out)
    for name, wanted in whole["answers"].items():
        assert found["answers"][name]["tokens"] == wanted["tokens"]
        assert found["answers"][name]["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-4)
        assert found["answers"][name]["plan"] == wanted["plan"]
    assert set(whole["hooks"]) - set(found["hooks"]) == set().union(*(HOOKS.get(feature, ()) for feature in out)) & set(
        whole["hooks"]
    )
    assert set(found["hooks"]) >= OF_THE_CORE
