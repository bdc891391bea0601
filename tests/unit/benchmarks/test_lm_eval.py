"""docs/star-accuracy.md has the table of lm_eval's results, and a plan is measured on dense's prompts only."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest

from benchmarks import lm_eval
from benchmarks.report import RESULTS
from starling.evaluation.plans import parse_plan

PAGE = (RESULTS.parents[1] / "docs" / "star-accuracy.md").read_text(encoding="utf-8")
LENGTH, PROMPTS = 2048, 2
METRICS = """# TYPE starling:requests counter
starling:requests_total{attention="dense"} 3.0
starling:requests_total{attention="star"} 4.0
"""
PROGRAM = """#!{python}
import json, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
star = json.loads(options["--gen_kwargs"])["vllm_xargs"]["star"]
out = pathlib.Path(options["--output_path"]) / "model"
out.mkdir(parents=True)
(out / "results_1.json").write_text(json.dumps({{"lm_eval_version": "0"}}))
for task in options["--tasks"].split(","):
    samples = [
        {{"prompt_hash": prompt, "2048": 1.0 if star == "off" else 0.5, "resps": [[star]]}} for prompt in "ab"
    ]
    (out / f"samples_{{task}}_1.jsonl").write_text("\\n".join(map(json.dumps, samples)))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A measurement with a program in the place of lm_eval, and a server whose count of star requests is given."""
    program = tmp_path / "lm_eval"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(lm_eval, "FOLDER", tmp_path / "out")
    monkeypatch.setattr(lm_eval, "served", lambda model, options, log: contextlib.nullcontext("http://server"))

    def measure(*counts: int):
        read = iter(counts)
        monkeypatch.setattr(lm_eval, "star_requests", lambda base_url: next(read))
        return lm_eval.measure(program, "models/small", list(lm_eval.DEFAULT_TASKS), LENGTH, PROMPTS, [])

    return measure


def test_samples_may_have_characters_that_end_lines_elsewhere(tmp_path):
    sample = {"prompt_hash": "a", "2048": 1.0, "resps": [["one\u2028two\u0085"]]}
    text = json.dumps(sample, ensure_ascii=False) + "\n"
    (tmp_path / "samples_vt_1.jsonl").write_text(text, encoding="utf-8")
    assert lm_eval.read_samples(tmp_path, "vt", LENGTH) == {"a": (1.0, "one\u2028two\u0085")}


def test_the_page_has_the_table_of_the_results():
    stored = sorted(RESULTS.glob("lm_eval_*.json"))
    assert stored
    assert lm_eval.markdown([json.loads(path.read_text()) for path in stored]) in PAGE


def test_each_plan_is_compared_with_dense(run):
    counts = (
        0,
        0,
        0,
        4,
        4,
        8,
        8,
        12,
        12,
        16,
    )  # before and after dense, and four star plans of two tasks and two prompts
    result = run(*counts)
    assert [(cell["task"], cell["prompts"], cell["score"]) for cell in result["cells"]] == [
        *[("niah_multikey_2", 2, 0.5)] * 4,
        *[("ruler_vt", 2, 0.5)] * 4,
    ]
    assert all(cell["difference"] == {"mean": -0.5, "low": -0.5, "high": -0.5} for cell in result["cells"])
    assert all(cell["same_as_dense"] == 0 for cell in result["cells"])


def test_a_plan_that_does_not_engage_is_an_error(run):
    with pytest.raises(ValueError, match="star ran on 0 prompts, and 4 were expected"):
        run(0, 0, 0, 0)


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match="other prompts than dense"):
        lm_eval.make_cell("task", "plan", {"a": (1.0, "text")}, {"b": (1.0, "text")})


def test_the_plan_goes_with_each_request_and_prompts_are_not_cut(tmp_path):
    plan = parse_plan("B=256,Q=128")
    program, tasks = tmp_path / "lm_eval", list(lm_eval.DEFAULT_TASKS)
    command = lm_eval.harness_command(program, "http://server", "model", plan, tasks, LENGTH, PROMPTS, tmp_path)
    options = dict(zip(command[2::2], command[3::2], strict=False))
    assert json.loads(options["--gen_kwargs"])["vllm_xargs"] == plan.options
    assert json.loads(options["--model_args"])["max_length"] > LENGTH


def test_star_requests_are_read_from_the_metrics(monkeypatch):
    monkeypatch.setattr(lm_eval.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(METRICS.encode()))
    assert lm_eval.star_requests("http://server") == 4
