"""`make bench`: benchmarks run one after the other, also after one that fails."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import run

WRITE = "import os, pathlib; pathlib.Path(os.environ['BENCHMARKS_OUT'], 'one.json').write_text('figures')"
NOT_RUN = {
    "engine": "an engine's process",
    "random_llama": "makes a model",
    "report": "writes results",
    "run": "runs the others",
    "streaming_clients": "clients of front_overhead",
}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_others_run_after_one_that_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(run.NEEDS, "absent", (lambda: False, "no such thing"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.json").write_text("old")
    commands = {
        "first": python(WRITE),
        "second": python("import sys; print('why it failed', file=sys.stderr); sys.exit(3)"),
        "absent": python("assert False"),
        "third": python("import os; print(os.environ['BENCHMARKS_NOTE'])"),
    }
    console = Console(width=120)
    outcomes = run.run_all(commands, out, "a busy machine", console)
    run.show(outcomes, out, console)
    states = ["done", "failed (exit code 3)", "left out: no such thing", "done"]
    assert [outcome.state for outcome in outcomes] == states
    assert [outcome.files for outcome in outcomes] == [("one.json",), (), (), ()]
    assert [outcome.failed for outcome in outcomes] == [False, True, False, False]
    assert (out / "second.log").read_text() == "why it failed\n"
    printed = capfd.readouterr().out
    assert "a busy machine" in printed and "why it failed" in printed
    assert "failed: second. " in printed


def test_every_benchmark_is_run():
    folder = run.ROOT / "benchmarks"
    programs = {path for path in folder.rglob("*.py") if '__name__ == "__main__"' in path.read_text()}
    names = {path.relative_to(folder).with_suffix("").as_posix().replace("/", ".") for path in programs}
    found = {name.removesuffix(".__main__") for name in names} - {"llama_cpp.job"}
    assert found - NOT_RUN.keys() == run.FULL.keys()
    assert run.QUICK.keys() <= run.FULL.keys()


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def test_every_benchmark_can_be_imported():
    """In one process of its own: some of them set what holds for the whole process, such as torch's threads."""
    specs = {name: find_spec(f"benchmarks.{name}") for name in run.FULL}
    modules = [spec.name + (".__main__" if spec.submodule_search_locations else "") for spec in specs.values()]
    done = subprocess.run([*python(IMPORT_ALL), *modules], cwd=run.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize(("name", "arguments"), [*run.QUICK.items(), *run.FULL.items()])
def test_options_of_benchmarks_exist(name, arguments):
    module = find_spec(f"benchmarks.{name}")
    program = find_spec(f"benchmarks.{name}.__main__") if module.submodule_search_locations else module
    text = Path(program.origin).read_text()
    assert [option for option in arguments.split() if option.startswith("--") and f'"{option}"' not in text] == []
