"""Runs a job in a process of its own, since it replaces vLLM's platform, and shows each backend's worst difference."""

from __future__ import annotations

import json

import pytest

from tests.forks import run_in_fork
from tests.parity.harness import v2_env

PROPERTY = "gpu_contract"
FACTS = ("one_token_rows", "windowed", "padded", "split_pages")


@pytest.fixture
def check_job(record_property):
    """A function that runs a job of job.py and checks its tally: each of the facts is true of some case."""

    def check(name: str, cases: int, facts: tuple[str, ...] = FACTS) -> None:
        quiet = v2_env() | {"VLLM_LOGGING_LEVEL": "ERROR"}
        job = "tests.gpu_contract.job"
        done = run_in_fork(f"{job}:main", name, *facts, imports=(job,), before=quiet, seconds=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        line = done.stdout.splitlines()[-1]
        record_property(PROPERTY, line)
        tally = json.loads(line)
        assert tally["cases"] >= cases
        assert tally["worst"] <= 1e-6
        assert tally["gathered"] >= cases // 8, "too few steps have rows of scattered pages"
        for fact in facts:
            assert tally.get(fact), f"no case has {fact}"

    return check


def pytest_terminal_summary(terminalreporter):
    lines = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if lines:
        terminalreporter.section("GPU contract: cases, and the worst difference from the explicit mask")
        for line in sorted(set(lines)):
            terminalreporter.write_line(line)
