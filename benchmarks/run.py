"""Run the benchmarks one after the other: `python -m benchmarks.run [--quick] [NAME ...]`.

A benchmark that fails does not end the run. The program writes JSON, figures and the output of each benchmark to
benchmarks/out, prints a table at the end, and exits with 1 if a benchmark has failed. Takes about 20 minutes with
--quick on two cores, and some hours without.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out"

QUICK: dict[str, str] = {
    "star_ttft": "--lengths 8192 16384 --smollm2-tokens 4032 --repeats 1",
    "dense_cost": "--starts 1 --rounds 4",
    "block_reuse": "--tokens 8192 --repeats 2",
    "block_positions": "--tokens 8192 --repeats 2",
    "kernels.cpu_attention": "--tokens 8192 --context 8192 --rounds 2",
    "front_overhead": "--streams 1 16 --rounds 3",
    "replicas.ttft": "--tokens 16384 --blocks 8 --repeats 1",
    "replicas.model": "",
    "goodput": "--rates 0.2 0.6 --prompts 10",
    "llama_cpp": "--lengths 2048 --rounds 1",
}
"""Module below benchmarks/ -> its arguments."""

FULL: dict[str, str] = {
    "star_ttft": "",
    "dense_cost": "",
    "host_step": "",
    "block_reuse": "",
    "block_positions": "",
    "library": "",
    "routing": "",
    "default_plan": "models/qwen2.5-coder-0.5b-instruct",
    "rag": "models/qwen2.5-coder-0.5b-instruct",
    "adapter": "models/smollm2-135m-instruct build/adapter",
    "adapter_options": "models/smollm2-135m-instruct",
    "adapter_cost": "models/smollm2-135m-instruct build/adapter",
    "fairness": "",
    "agents": "",
    "accuracy": "models/smollm2-135m-instruct",
    "dense_heads": "models/smollm2-135m-instruct",
    "approximations": "models/smollm2-135m-instruct",
    "retrieval": "",
    "lm_eval": "models/qwen2.5-coder-0.5b-instruct",
    "load_tools": "models/smollm2-135m-instruct",
    "kernels.cpu_attention": "",
    "kernels.cpu_kernels": "",
    "kernels.gpu_kernels": "",
    "kv_shift.cost": "",
    "attamba.speed": "",
    "attamba.capacity": "",
    "attamba.quality": "",
    "front_overhead": "",
    "replicas.ttft": "",
    "replicas.model": "",
    "replicas.shards": "",
    "goodput": "",
    "llama_cpp": "",
    "soak": "--minutes 10",
}

NEEDS = {
    "kernels.gpu_kernels": (lambda: Path("/dev/nvidia0").exists(), "no GPU"),
    "llama_cpp": (lambda: (ROOT / "build/llama/venv/bin/python").exists(), "no llama.cpp: `make bench-llama`"),
    "default_plan": (lambda: (ROOT / FULL["default_plan"]).exists(), "no model (`make eval-model`)"),
    "rag": (lambda: (ROOT / FULL["rag"]).exists(), "no model (`make eval-model`)"),
    "load_tools": (
        lambda: all((ROOT / "build/load-tools" / name).exists() for name in ("guidellm", "aiperf")),
        "no GuideLLM and AIPerf (see docs/benchmarks.md)",
    ),
    "lm_eval": (
        lambda: (ROOT / "build/lm-eval/bin/lm_eval").exists() and (ROOT / FULL["lm_eval"]).exists(),
        "no lm_eval (see docs/eval.md), or no model (`make eval-model`)",
    ),
}
"""Benchmark -> whether this machine has what it needs, and what to say if not."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a benchmark.

    Attributes:
        state: "done", "failed (exit code N)", or why it was left out.
        files: files that it wrote, relative to the folder of the run.
    """

    name: str
    state: str
    seconds: float = 0.0
    files: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.state.startswith("failed")


def changed(folder: Path, before: Mapping[Path, int]) -> tuple[str, ...]:
    """Return the files of a folder, except logs, that are new or that were written since ``before``."""
    after = times(folder)
    found = [path for path, written in after.items() if before.get(path) != written and path.suffix != ".log"]
    return tuple(sorted(path.relative_to(folder).as_posix() for path in found))


def times(folder: Path) -> dict[Path, int]:
    """Return when each file of a folder was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run(name: str, command: Sequence[str], out: Path, environment: Mapping[str, str]) -> Outcome:
    """Run one benchmark, and print its output, which is also in ``out``/NAME.log."""
    before, started, log = times(out), time.monotonic(), out / f"{name}.log"
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, env=environment).returncode
    print(log.read_text(errors="replace"), flush=True)
    state = f"failed (exit code {code})" if code else "done"
    return Outcome(name, state, time.monotonic() - started, changed(out, before))


def run_all(commands: Mapping[str, Sequence[str]], out: Path, note: str | None, console: Console) -> list[Outcome]:
    """Run benchmarks, by name, one after the other.

    Args:
        out: the folder to write to; it is made.
        note: stored with all figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    own = {"BENCHMARKS_OUT": str(out), "COLUMNS": "120"} | ({"BENCHMARKS_NOTE": note} if note else {})
    outcomes = []
    for name, command in commands.items():
        is_there, missing = NEEDS.get(name, (lambda: True, ""))
        if not is_there():
            outcomes.append(Outcome(name, f"left out: {missing}"))
            continue
        console.rule(f"{name} ({len(outcomes) + 1} of {len(commands)})")
        outcomes.append(run(name, command, out, os.environ | own))
    return outcomes


def show(outcomes: Sequence[Outcome], out: Path, console: Console) -> None:
    table = Table("benchmark", "outcome", "minutes", f"files in {out}")
    for outcome in outcomes:
        minutes = f"{outcome.seconds / 60:.1f}"
        table.add_row(outcome.name, escape(outcome.state), minutes, "\n".join(outcome.files))
    console.print(table)
    if failed := [outcome.name for outcome in outcomes if outcome.failed]:
        console.print(f"failed: {', '.join(failed)}. Each one's output is in {out}/NAME.log.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run, of {', '.join(FULL)}")
    parser.add_argument("--quick", action="store_true", help=f"smaller settings; by default {', '.join(QUICK)}")
    parser.add_argument("--note", help="a text to store with the figures, such as what else the machine does")
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL
    if unknown := [name for name in args.names if name not in settings]:
        parser.error(f"NAME {', '.join(unknown)}: no such benchmark. Allowed: {', '.join(settings)}.")
    commands = {
        name: [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
        for name, arguments in settings.items()
        if not args.names or name in args.names
    }
    console = Console(width=120)
    outcomes = run_all(commands, OUT, args.note, console)
    show(outcomes, OUT, console)
    raise SystemExit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
