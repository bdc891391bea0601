"""Quantised layers of an engine for documents are looked at in the dtype that their kernels take, the model's."""

from __future__ import annotations

import json

from tests.forks import run_in_fork
from tests.parity.harness import v2_env

JOB = "tests.gpu_contract.quantised_job"


def test_queries_and_keys_of_quantised_layers_are_found_to_turn():
    quiet = v2_env() | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = run_in_fork(f"{JOB}:main", imports=(JOB,), before=quiet, seconds=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and not any(found.values()), found
