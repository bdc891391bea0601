"""`from starling import LLM, StarOptions`: star options as arguments of an engine and of its calls."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.random_llama import make_random_llama
from starling.config.parsing import OptionError
from starling.config.star import StarOptions
from tests.forks import run_in_fork
from tests.parity.engine_job import RESULT
from tests.parity.harness import OF_ENGINES, TINY, cores


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(scope="module")
def result(model):
    """Of the one engine of most of these tests."""
    return result_of("llm_job", model)


def result_of(job: str, model) -> dict:
    """What a job says of its engine, whose front, core and worker are one process."""
    with cores(1) as bound:
        env = {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = run_in_fork(f"tests.parity.{job}:main", str(model), imports=OF_ENGINES, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


@pytest.mark.engine
def test_every_way_to_give_star_options_is_the_same(result):
    plans = result["plans"]
    assert plans["fields"] == plans["flat"] == plans["options"]
    assert {name: plans["options"][name] for name in ("attention", "block_size", "context_end", "anchor_size")} == {
        "attention": "star",
        "block_size": 256,
        "context_end": 900 - 37,
        "anchor_size": 0,  # the engine's default
    }
    assert plans["chat"]["attention"] == "star"


@pytest.mark.engine
def test_a_call_without_star_options_has_the_engines(result):
    assert result["plans"]["none"]["attention"] == "dense"
    assert result["params"] is None, "a call leaves its argument alone"


@pytest.mark.engine
def test_star_options_with_a_list_of_parameters_and_with_none(result):
    block = result["plans"]["word"]
    assert (block["attention"], block["why"]) == ("dense", "on this server star_quality=balanced is dense")
    assert result["plans"]["each"] == result["plans"]["default"] == block
    assert result["tokens"]["each"] == 2 and result["tokens"]["default"] > 2
    assert result["sources"] == [None] * 9


@pytest.mark.engine
def test_a_quality_is_what_the_engine_says(result):
    plan = result["plans"]["quality"]
    assert (plan["attention"], plan["block_size"], plan["context_end"]) == ("star", 192, 900 - 450), (
        "900/5 in whole pages"
    )


@pytest.mark.engine
def test_refused_options_have_their_names(result):
    refused = result["refused"]
    name = "star_blok_size=256 is refused: there is no such star option, did you mean star_block_size"
    assert refused["name"].startswith(name)
    assert refused["value"].startswith("star='onn' is refused") and "off, on, auto" in refused["value"]
    assert "star_block_size=100 is refused" in refused["page"]


def test_the_package_imports_nothing_of_itself():
    """Without LLM it needs no vLLM, and without StarOptions no pydantic."""
    check = """
import sys
sys.modules["vllm"] = sys.modules["torch"] = None
import starling
assert "pydantic" not in sys.modules
from starling import StarOptions
print(StarOptions(mode="on", block_size="n/8").block_size)
try:
    starling.Engine
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["n/8", "module 'starling' has no attribute 'Engine'"], done.stderr


def test_the_entry_that_activates_starling():
    from starling.engine_ext.front.llm import activated

    assert activated({}, None) == {"starling": {}}
    assert activated({"other": 1}, "auto") == {"other": 1, "starling": {"star": "auto"}}
    joined = activated({"starling": {"star": "on", "fairness": 1}}, StarOptions(mode="on", block_size=512))
    assert joined == {"starling": {"star": "on", "fairness": 1, "star_block_size": 512}}
    with pytest.raises(OptionError, match=r"star='on' is refused: additional_config says star='off'"):
        activated({"starling": {"star": "off"}}, "on")
    with pytest.raises(OptionError, match="did you mean star_block_size"):
        activated({}, {"blok_size": 5})


def test_an_environment_without_the_plugin_is_refused(monkeypatch):
    from starling import LLM

    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(OptionError, match="VLLM_PLUGINS='' is refused: it keeps Starling out of vLLM"):
        LLM("any")
