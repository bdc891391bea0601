"""The gates of quality and of work: what plans cost the answers of a trained model, and what work they take.

gates.json has the figures. ``python -m tests.parity.gates_job`` writes it anew, where a change is meant to move them.
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from tests.forks import run_in_fork
from tests.parity.engine_job import RESULT
from tests.parity.gates_job import PLANS, STORED
from tests.parity.harness import OF_ENGINES, cores

pytestmark = pytest.mark.engine

LIMIT = 5e-4
"""Of a loss, in nats a token: float32 on another processor moves one by a ten-thousandth."""


@pytest.fixture(scope="module")
def found():
    with cores(1) as bound:
        env = {
            "VLLM_CPU_OMP_THREADS_BIND": bound,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": None,
        }
        done = run_in_fork("tests.parity.gates_job:main", imports=OF_ENGINES, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


def test_the_right_answers_are_as_probable_as_they_were(found, stored):
    assert list(found["losses"]) == list(PLANS)
    assert found["losses"] == pytest.approx(stored["losses"], abs=LIMIT)


def test_the_plans_of_the_gate_of_quality_differ(found):
    """Else a plan has not engaged, and its loss says nothing."""
    losses = sorted(found["losses"].values())
    assert min(after - before for before, after in pairwise(losses)) > 2 * LIMIT


def test_no_prompt_takes_more_work_than_it_did(found, stored):
    grown = {
        (prompt, figure): (stored["work"][prompt].get(figure, 0), number)
        for prompt, figures in found["work"].items()
        for figure, number in figures.items()
        if number > stored["work"][prompt].get(figure, 0)
    }
    assert not grown, "(what was stored, what it takes now)"


def test_each_gate_has_its_figures(found, stored):
    """A figure that is no longer counted can't grow."""
    assert {prompt: set(figures) for prompt, figures in found["work"].items()} == {
        prompt: set(figures) for prompt, figures in stored["work"].items()
    }
