"""The compatibility matrix is made from test results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
XML = """<testsuites><testsuite>
<testcase classname="tests.unit.test_a" name="passes[1]"/>
<testcase classname="tests.unit.test_a" name="fails"><failure message="why"/></testcase>
<testcase classname="tests.e2e.test_b" name="is_skipped"><skipped message="why"/></testcase>
<testcase classname="tests.e2e.test_b" name="has_no_server"><error message="why"/></testcase>
</testsuite></testsuites>"""
RUN = {"vllm": "0.9.0", "kind": "overlay", "python": "3.11.7", "torch": "2", "triton": "3", "transformers": "5"}


@pytest.fixture
def compatibility(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / ".ci/compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "environment", lambda: dict(RUN))
    return module


def test_the_committed_page_is_that_of_the_committed_results(compatibility):
    results = json.loads(compatibility.RESULTS.read_text())
    assert compatibility.PAGE.read_text() == compatibility.page(results), "run `make compatibility`"


def test_outcomes_are_counted_by_suite(compatibility, tmp_path):
    (tmp_path / "all.xml").write_text(XML)
    results = {"tests": [RUN | {"suites": {"unit": {"passed": 7}}}], "wheels": [], "cuda": [], "gpus": []}
    compatibility.add(results, "tests", tmp_path)
    (run,) = results["tests"]
    assert run["suites"] == {"unit": {"passed": 1, "failed": 1}, "e2e": {"failed": 1, "skipped": 1}}
    page = compatibility.page(results)
    assert "| 0.9.0 | overlay | 3.11.7 | 2 | 3 | 5 | 1, 1 failed | - | - | - | 0, 1 failed, 1 skipped |" in page
    assert "Not run." in page and "no GPU was at hand" in page


def test_wheels_gpus_and_packages_of_gpu_servers_are_added(compatibility, tmp_path):
    wheel = {"python": "3.12.1", "vllm": "0.9.0+cpu", "torch": "2", "result": "installed", "seconds": 3}
    (tmp_path / "3.12.1.json").write_text(json.dumps(wheel))
    checks = [{"verdict": verdict} for verdict in ("PASS", "PASS", "SKIP")]
    machine = {"cards": ["H100"], "vLLM": "0.9.0", "torch": "2"}
    (tmp_path / "report").write_text(json.dumps({"machine": machine, "checks": checks}))
    pins = {name: "2" for name in compatibility.ON_GPUS} | {"vllm": "0.9.0", "other": "1+cu13"}
    (tmp_path / "3.12-0.9.0.txt").write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()))
    results = {"tests": [], "wheels": [], "cuda": [], "gpus": []}
    for kind, path in (("wheels", tmp_path), ("gpus", tmp_path / "report"), ("cuda", tmp_path)):
        compatibility.add(results, kind, path)
    page = compatibility.page(results)
    assert "| 3.12.1 | 0.9.0+cpu | 2 | installed |" in page
    assert "| H100 | 0.9.0 | 2 | 2 | 0 |" in page and "no GPU was at hand" not in page
    assert f"| 3.12 | 0.9.0 | 2 | 2 | 2 | 2 | 2 | 2 | {len(pins)} | 20" in page and "Not resolved." not in page


def test_no_results_are_an_error(compatibility, tmp_path):
    with pytest.raises(SystemExit, match="no results in"):
        compatibility.add({"tests": []}, "tests", tmp_path)
