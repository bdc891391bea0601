"""The op as it is compiled for processors with fewer features than this one has."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.forks import INHERITED, ROOT
from tests.parity.harness import OLDER_PROCESSORS, older_env

TESTS = "test_op or test_long_rows_on or test_error_is_at_most_torchs"


@pytest.mark.parametrize("processor", OLDER_PROCESSORS)
def test_the_op_of_an_older_processor(processor):
    """Tests of test_attention.py, in a process of their own: torch and the op are loaded for one processor."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/cpu/test_attention.py"]
    env = INHERITED | older_env(processor)
    done = subprocess.run([*command, "-k", TESTS], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize(
    ("processor", "kept", "left_out"),
    [
        ("avx512", ["__AVX512F__"], ["__AVX512BF16__", "__AMX_TILE__"]),
        ("avx2", ["__AVX2__"], ["__AVX512F__", "__AMX_"]),
    ],
)
def test_an_older_processor_has_the_features_of_its_name_alone(processor, kept, left_out):
    env = INHERITED | older_env(processor)
    compiler = [env["CXX"], "-march=sapphirerapids", "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(compiler, env=env, check=True, capture_output=True, text=True).stdout
    assert all(name in macros for name in kept) and not any(name in macros for name in left_out)
    program = "from starling.attention_backends.kernels.cpu.paged_op import Processor as P; print(P.detect())"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    assert "bf16_dot=False" in found.stdout and (processor == "avx512" or "avx512=False" in found.stdout)
