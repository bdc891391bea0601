"""`make test` with fakes of its parts: all of them run, and the last line names those that failed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CHECKS = ["lint", "layers", "types", "proto-check", "docs"]
FIRST = ["env", "demo-model"]
PARTS = {"test": [*CHECKS, "tests-first"], "test-all": ["env-next", "load-tools", "tests-rest", "test-next"]}
LAST = {"test": "layers tests-first", "test-all": "tests-rest"}
FAKES = """
include {root}/Makefile
.PHONY: {parts}
{parts}:
\t@echo $@ >> ran
\t@case " $(BROKEN) " in *" $@ "*) exit 3;; esac
"""


def run_make(folder: Path, target: str, *broken: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The end of `make`, and which parts ran, in order."""
    parts = [*FIRST, "lint-docker", "browser", *PARTS["test"], *PARTS["test-all"]]
    (folder / "Makefile").write_text(FAKES.format(root=ROOT, parts=" ".join(parts)))
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    files = ("ENV", "NEXT_ENV", "LOAD_TOOLS_ENV", "MODEL")  # those that the first parts make
    nothing = [f"{name}=" for name in files]
    command = ["make", target, *nothing, f"BROKEN={' '.join(broken)}"]
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    return done, (folder / "ran").read_text().split()


@pytest.mark.parametrize("target", PARTS)
def test_all_parts_run_and_the_last_line_names_those_that_failed(tmp_path, target):
    done, ran = run_make(tmp_path, target, "layers", "tests-first", "tests-rest")
    assert set(ran) - {"lint-docker"} == {*FIRST, *PARTS[target]}
    assert done.returncode == 2
    assert re.fullmatch(rf"make {target}: \d+ s, failed: {LAST[target]}", done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", PARTS)
def test_where_nothing_fails_an_earlier_failure_is_forgotten(tmp_path, target):
    assert run_make(tmp_path, target, PARTS[target][-1])[0].returncode
    done, ran = run_make(tmp_path, target)
    assert (done.returncode, "failed" in done.stdout) == (0, False), done.stderr
    assert ran.count(PARTS[target][-1]) == 2
    assert re.fullmatch(rf"make {target}: \d+ s", done.stdout.splitlines()[-1])


def test_without_an_environment_nothing_else_runs(tmp_path):
    done, ran = run_make(tmp_path, "test", "env")
    assert done.returncode and ran == ["env"]
