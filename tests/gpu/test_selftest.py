"""The checks of `starling selftest` on a GPU, one test each: `pytest -m gpu`."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from starling.lab.machine import has_gpu
from starling.lab.selftest.result import Verdict, judge
from starling.lab.selftest.selftest import make_suite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU that torch can use")]


@pytest.fixture(scope="module")
def checks():
    with ExitStack() as stack:
        yield {check.name: check for check in stack.enter_context(make_suite(None, gpu=True, quick=False))[0]}


def names() -> list[str]:
    """The names of a GPU's checks. Nothing of them runs."""
    if not has_gpu():
        return ["every check"]
    with make_suite(None, gpu=True, quick=False) as (checks, _):
        return [check.name for check in checks]


@pytest.mark.parametrize("name", names())
def test_check(checks, name):
    outcome = judge(checks[name])
    if outcome.verdict is Verdict.SKIP:
        pytest.skip(outcome.detail)
    assert outcome.verdict is Verdict.PASS, outcome
