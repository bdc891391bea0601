"""The checks of `make release` that need no build."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from starling.lab.selftest import result
from starling.lab.selftest import selftest as selftest

ROOT = Path(__file__).parents[3]


def call_git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tracked(release) -> list[str]:
    return ["engine_ext/serving/http/live_page.html", "starling/py.typed", "config/scheduling.py"]


@pytest.fixture
def names(release) -> list[str]:
    metadata = [f"vllm_starling-0.1.0.dist-info/{name}" for name in release.METADATA]
    return [*release.REQUIRED, "starling/config/scheduling.py", *metadata]


def test_a_wheel_with_what_git_has(release, names, tracked):
    assert release.wheel_problems(names, tracked) == []


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("lacks", "starling/py.typed"),
        ("lacks", "starling/engine_ext/serving/http/live_page.html"),
        ("lacks", "vllm_starling-0.1.0.dist-info/licenses/LICENSE"),
        ("has", "tests/conftest.py"),
        ("has", "starling/engine_ext/scratch.py"),
        ("has", "vllm_starling-0.1.0.dist-info/x"),
    ],
)
def test_a_wheel_with_a_file_less_or_more(release, names, tracked, verb, name):
    found = [other for other in names if other != name] if verb == "lacks" else [*names, name]
    (problem,) = release.wheel_problems(found, tracked)
    assert verb in problem and Path(name).name in problem


def test_an_index_gets_no_link_that_leads_nowhere_and_commands_that_install_from_it(release):
    """With the substitutions as hatch's plugin makes them, one after the other."""
    text = (ROOT / "README.md").read_text()
    assert release.readme_problems(text), "links of the repository, which it looks for"
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    for step in hooks["fancy-pypi-readme"]["substitutions"]:
        changed = re.sub(step["pattern"], step["replacement"], text)
        assert changed != text, step
        text = changed
    assert release.readme_problems(text) == []
    assert "pip install 'vllm-starling[cuda]'" in text and "pip install vllm-starling && starling setup-cpu" in text
    assert text.endswith("The documentation is in docs/ of the repository.\n")


def test_the_self_test_has_the_options_of_the_release(release):
    """An option that it does not have ends it with 2, as a machine without a GPU does."""
    args = selftest.make_parser().parse_args(release.SELFTEST)
    assert args.quick and str(args.report / result.JSON) == release.REPORT


def test_every_folder_of_the_checkout_with_modules_of_starling_is_in_the_package(release):
    tracked = call_git("ls-files", "--", "*/__init__.py")
    folders = {path.split("/")[0] for path in tracked} - {"tests", "benchmarks", "examples"}
    assert folders == {name.partition("/")[0] for name in release.PACKAGES}


def test_hatch_puts_one_folder_into_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["starling"]}


def test_a_python_that_does_not_run_is_not_found(release, tmp_path):
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert release.find_python("false", str(shim)) is None
