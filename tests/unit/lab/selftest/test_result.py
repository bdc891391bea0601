"""How checks are judged, printed and written, with checks that run nothing."""

from __future__ import annotations

import contextlib
import json
import math
import sys

import pytest

from starling.engine_ext.serving.cli import main
from starling.lab import machine
from starling.lab.selftest import selftest as selftest
from starling.lab.selftest.result import Check, Result, Skip, Verdict, exit_code, judge


def fail() -> Result:
    raise ValueError("no [kernel]")


CHECKS = {
    "in its bound": (lambda: Result(1.5, 1.5, "x", "a detail"), Verdict.PASS),
    "without a bound": (lambda: Result(12.3456, None, "ms"), Verdict.PASS),
    "skipped": (lambda: Skip("no GPU"), Verdict.SKIP),
    "above its bound": (lambda: Result(1.6, 1.5, "x"), Verdict.FAIL),
    "not a number": (lambda: Result(math.nan, 1.5, "x"), Verdict.FAIL),
    "not a number, no bound": (lambda: Result(math.nan, None, "x"), Verdict.FAIL),
    "infinite": (lambda: Result(math.inf, 1.5, "x"), Verdict.FAIL),
    "an exception": (fail, Verdict.FAIL),
}
GOOD = ("in its bound", "without a bound", "skipped")


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_is_judged_by_its_bound(name):
    run, verdict = CHECKS[name]
    assert judge(Check(name, run)).verdict is verdict


def test_an_exception_is_the_detail_of_the_failure():
    outcome = judge(Check("crashes", fail))
    assert (outcome.detail, outcome.measured) == ("ValueError: no [kernel]", None)
    assert selftest.format_outcome(outcome).endswith(r"crashes | ValueError: no \[kernel]")


def test_a_line_has_name_measured_bound_and_detail():
    line = selftest.format_outcome(judge(Check("name", CHECKS["in its bound"][0])))
    assert line == "[green]PASS[/green] name | 1.5 x (at most 1.5) | a detail"


@pytest.mark.parametrize(
    ("names", "gpu", "code"),
    [(GOOD, True, 0), (GOOD, False, 2), ([*GOOD, "infinite"], True, 1), (["an exception"], False, 1), ([], True, 0)],
)
def test_exit_codes(names, gpu, code):
    assert exit_code([judge(Check(name, CHECKS[name][0])) for name in names], gpu) == code


def run(monkeypatch, names, gpu, *arguments: str) -> int:
    """`starling selftest` with some of ``CHECKS``."""
    for module in (machine, selftest):
        monkeypatch.setattr(module, "has_gpu", lambda: gpu, raising=False)
    monkeypatch.setattr(machine, "describe_machine", lambda: {"cards": ["a card"], "xformers": None})
    checks = [Check(name, CHECKS[name][0]) for name in names]
    monkeypatch.setattr(selftest, "make_suite", lambda *args, **kw: contextlib.nullcontext((checks, {})))
    for name, value in selftest.QUIET.items():
        monkeypatch.setenv(name, value)
    return main.main(["selftest", *arguments])


def test_the_command_prints_a_line_for_each_check_and_writes_one_json_object(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert run(monkeypatch, CHECKS, True, "--report", str(path.parent)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["cards: a card", "xformers: not installed"]
    assert [line.split(" ", 1)[0] for line in lines[2:-1]] == [verdict.value for _, verdict in CHECKS.values()]
    assert lines[-1] == "2 PASS, 5 FAIL, 1 SKIP"
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report["exit"] == 1
    assert [check["verdict"] for check in report["checks"]] == [verdict.value for _, verdict in CHECKS.values()]
    first = dict(name="in its bound", verdict="PASS", measured=1.5, bound=1.5, unit="x", detail="a detail")
    assert report["checks"][0] | first == report["checks"][0]
    assert report["machine"] == {"cards": ["a card"], "xformers": None}
    page = path.with_name("report.md").read_text()
    assert page.startswith("# starling selftest: 2 PASS, 5 FAIL, 1 SKIP\n")
    assert "- cards: a card" in page and "xformers" not in page
    assert "| PASS | in its bound | 1.5 x (at most 1.5) | a detail | 0 |" in page
    assert page.count("\n| ") == 2 + len(CHECKS)


def test_a_run_that_was_ended_goes_on_and_judges_failures_again(monkeypatch, tmp_path, capsys):
    ran = []

    def counted(name: str, result: Result | BaseException):
        def check() -> Result:
            ran.append(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return check, None

    fine = Result(1.0, None, "x")
    monkeypatch.setattr(sys.modules[__name__], "CHECKS", {
        "fine": counted("fine", fine),
        "fails": counted("fails", ValueError("once | more")),
        "ended": counted("ended", KeyboardInterrupt()),
    })  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, CHECKS, True, "--report", str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert "the run has not ended" in page and r"once \| more" in page
    CHECKS["ended"] = counted("ended", fine)
    capsys.readouterr()
    assert run(monkeypatch, CHECKS, True, "--report", str(tmp_path)) == 1
    assert ran == ["fine", "fails", "ended", "fails", "ended"]
    assert "fine | 1 x (from an earlier run)" in capsys.readouterr().out
    assert "has not ended" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("no JSON", "is no report of `starling selftest`"),
        ('{"checks": []}', "is no report of `starling selftest`"),
        ('{"checks": [], "engines": {}, "machine": {}, "options": {"model": 1}}', "another machine and other options"),
    ],
)
def test_another_report_is_not_overwritten(monkeypatch, tmp_path, capsys, stored, message):
    (tmp_path / "report.json").write_text(stored)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, GOOD, True, "--report", str(tmp_path))
    assert message in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == stored


@pytest.mark.parametrize(("gpu", "code", "warned"), [(True, 0, False), (False, 2, True)])
def test_without_a_gpu_the_command_says_what_was_not_checked(monkeypatch, capsys, gpu, code, warned):
    assert run(monkeypatch, GOOD, gpu) == code
    assert ("nothing of the CUDA path was checked" in capsys.readouterr().out) == warned


def test_the_machine_of_this_process():
    described = machine.describe_machine()
    assert described["torch"] and described["vLLM"] and described["Starling"]
    assert bool(described["cards"]) == machine.has_gpu()
