from __future__ import annotations

from tests.forks import run_in_fork


def test_the_fake_gpu_does_what_the_tests_of_engines_rely_on():
    done = run_in_fork("tests.gpu_shim.checks:main", imports=("tests.gpu_shim.checks",), seconds=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
