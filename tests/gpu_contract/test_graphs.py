"""Decode steps of documents in full CUDA graphs: a replay has the numbers of its own step."""

from __future__ import annotations

import json

import pytest

from tests.forks import run_in_fork
from tests.gpu_contract.conftest import PROPERTY
from tests.parity.harness import v2_env

JOB = "tests.gpu_contract.graphs_job"


@pytest.mark.parametrize("backend", ["flash_attention", "triton"])
def test_a_replayed_graph_meets_the_keys_of_its_step(record_property, backend):
    quiet = v2_env() | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = run_in_fork(f"{JOB}:main", backend, imports=(JOB,), before=quiet, seconds=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    line = done.stdout.splitlines()[-1]
    record_property(PROPERTY, line)
    tally = json.loads(line)
    assert tally["worst"] <= 1e-6
    assert min(tally[fact] for fact in ("documents", "dense", "padded")) > 0
