""".ci/env.sh with fakes of Python and uv: which Pythons it takes, and what it passes to uv."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NOT_311 = "The lock file has the hashes of torch's wheels for Python 3.11 alone."
FAKE_PYTHON = """#!/bin/sh
[ "$1" = -c ] || exit 0
exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
"""
FAKE_UV = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in *" -") cat > /dev/null ;; esac
"""


def add_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def add_python(path: Path, *version: int) -> Path:
    """A Python that says it has this version; `-m` does nothing."""
    return add_program(path, FAKE_PYTHON.format(python=sys.executable, version=version))


@pytest.fixture
def checkout(tmp_path):
    """A folder as env.sh finds a checkout, without .venv; `bin` comes first on PATH, and its uv writes what it gets."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/requirements-cpu.lock", ".ci/overrides.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    add_program(tmp_path / "bin/uv", FAKE_UV.format(folder=tmp_path))
    return tmp_path


def run_env(checkout: Path, action: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHON"))}
    environ = own | {"PATH": f"{checkout}/bin:/usr/bin:/bin"} | variables
    command = ["bash", ROOT / ".ci/env.sh", action]
    return subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 12, 0), (3, 13, 2)])
def test_another_python_is_refused_before_anything_is_made(checkout, version):
    python = add_python(checkout / "other", *version)
    done = run_env(checkout, "install", PYTHON=str(python))
    assert done.returncode == 1 and f"PYTHON={python} " in done.stderr and NOT_311 in done.stderr
    assert not (checkout / "calls").exists() and not (checkout / ".venv").exists()


@pytest.mark.parametrize("action", ["install", "lock"])
def test_a_venv_of_another_python_is_refused(checkout, action):
    add_python(checkout / ".venv/bin/python", 3, 12, 0)
    done = run_env(checkout, action)
    assert done.returncode == 1 and "delete .venv" in done.stderr and NOT_311 in done.stderr
    assert not (checkout / "calls").exists()


@pytest.mark.parametrize(("action", "command"), [("install", "pip install"), ("lock", "pip compile")])
def test_the_requirements_that_are_left_out_are_those_of_the_file(checkout, action, command):
    add_python(checkout / ".venv/bin/python", 3, 11, 4)
    done = run_env(checkout, action)
    assert done.returncode == 0, done.stderr
    first = (checkout / "calls").read_text().splitlines()[0]
    assert first.startswith(command) and "--override .ci/overrides.txt" in first


def test_the_settings_of_uv_for_a_checkout_leave_nothing_out():
    """They also hold for `uv pip install '.[cuda]'`, which needs what the environment for CPUs leaves out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    assert settings.keys() == {"conflicts"}
