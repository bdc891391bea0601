"""How many kernels Triton compiles for steps over documents: those of the warm-up, and none in a later step."""

from __future__ import annotations

import json

from tests.forks import run_in_fork
from tests.parity.harness import v2_env

JOB = "tests.gpu_contract.compiles_job"


def count(**env: str) -> dict:
    quiet = v2_env() | {"VLLM_LOGGING_LEVEL": "ERROR", "TRITON_INTERPRET": "0"}
    done = run_in_fork(f"{JOB}:main", imports=(JOB,), before=quiet, env=env, seconds=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_step_compiles_a_kernel_after_the_warm_up():
    counted = count()
    assert counted["rerotated"] > 20
    assert set(counted["later"].values()) == {0}, counted


def test_the_steps_need_all_that_the_warm_up_compiles():
    """Without it, the same steps compile as many kernels: the test above can fail, and the warm-up is no waste."""
    assert count(WARM_UP="0")["later"] == count()["warmed"]
