"""The programs in examples/ and benchmarks/: their --help, and the commands that serve_demo prints."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from starling.config.star import parse_options
from starling.scheduler.planning.facts import ONE_REPLICA
from tests.unit.plans import make_plan

ROOT = Path(__file__).parents[3]
NOT_FOR_USERS = {"benchmarks/engine.py", "benchmarks/llama_cpp/job.py", "examples/docker/check_requirements.py"}
PAGE_SIZE = 16


def test_every_program_has_a_help():
    """make_demo_model and make_eval_model have that of gguf_model."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("[be][ex][na][cm]*/**/*.py")}
    programs = {name: text for name, text in texts.items() if '__name__ == "__main__"' in text}
    silent = {name for name, text in programs.items() if "ArgumentParser(" not in text and "gguf_model" not in text}
    assert len(programs) > 20 and silent == NOT_FOR_USERS


@pytest.fixture
def printed(monkeypatch):
    """The commands of serve_demo, by description."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    serve_demo = importlib.import_module("serve_demo")
    return serve_demo.commands(SimpleNamespace(http="http://127.0.0.1:8000", grpc="127.0.0.1:50051"))


def test_the_first_command_sends_a_prompt_that_is_prefilled_with_star_attention(printed):
    make, send = next(iter(printed.values())).split(" | ")
    assert shlex.split(send)[:3] == ["curl", "-i", "http://127.0.0.1:8000/v1/completions"]
    request = json.loads(subprocess.check_output([sys.executable, *shlex.split(make)[1:]]))
    num_words = len(request["prompt"].split())  # the prompt has at least as many tokens
    options = parse_options(request["vllm_xargs"], flat=True)
    assert make_plan(num_words, options, None, PAGE_SIZE, ONE_REPLICA) is not None


def test_the_long_prompt_is_that_of_the_five_minutes(printed):
    make = next(iter(printed.values())).split(" | ")[0]
    code = shlex.split(make)[-1]
    assert f"$ python3 -c '{code}' > prompt.json" in (ROOT / "docs" / "five-minutes.md").read_text()


def test_the_readme_shows_its_first_request_which_has_ten_lines():
    code = (ROOT / "examples" / "first_request.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text()
    assert len(code.splitlines()) <= 10


def test_the_quick_start_of_the_readme_shows_what_starling_does_and_passes_its_tests():
    start = (ROOT / "README.md").read_text().split("## Quick start")[1].split("\n## ")[0]
    first, *others = re.findall(r"```console\n(.*?)```", start, re.DOTALL)
    assert re.findall(r"^\$ (make \w+) ", first, re.MULTILINE) == ["make demo", "make test"]
    assert "first_request.py" in others[0] and "`pip install .` needs a build of vLLM" in start
