"""`starling selftest`: checks this machine, and prints a line for each check."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from starling.selftest.result import NO_GPU, Outcome, Verdict, exit_code, judge

COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.SKIP: "yellow"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(argv: Sequence[str]) -> int:
    """Run the checks; returns 0, 1 if one failed, or 2 without a GPU, where the CPU part passed."""
    parser = argparse.ArgumentParser(
        prog="starling selftest",
        description="Checks whether Starling computes the right thing on this machine. Takes minutes.",
        epilog=f"Exit code: 0 passed, 1 a check failed, {NO_GPU} no GPU (the CPU part passed). See docs/selftest.md.",
    )
    parser.add_argument("model", nargs="?", help="a checkpoint for the engine checks; default: tiny random weights")
    parser.add_argument("--quick", action="store_true", help="one engine setting, and no times")
    parser.add_argument("--attention-backend", metavar="NAME", help="vLLM's attention backend; default: its choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE as one JSON object")
    args = parser.parse_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from starling.selftest.machine import describe_machine, has_gpu
    from starling.selftest.suite import make_suite

    console, gpu = Console(highlight=False, soft_wrap=True), has_gpu()
    machine = describe_machine()
    print_table(console, machine if gpu else machine | {"cards": "none: the CPU part runs"})
    outcomes: list[Outcome] = []
    with make_suite(args.model, gpu=gpu, quick=args.quick, backend=args.attention_backend) as (checks, engines):
        for number, check in enumerate(checks, start=1):
            with console.status(f"{number} of {len(checks)}: {escape(check.name)}"):
                outcomes.append(judge(check))
            console.print(format_outcome(outcomes[-1]))
        environments = {name: pair.star.environment() for name, pair in engines.items()}
    code = exit_code(outcomes, gpu)
    console.print(summary(outcomes, gpu))
    if args.json:
        report = {"machine": machine, "engines": environments, "checks": list(map(to_json, outcomes)), "exit": code}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return code


def print_table(console: Console, rows: dict[str, Any]) -> None:
    """Print a name and its value a line."""
    for name, value in rows.items():
        shown = "\n".join(value) if isinstance(value, list) else value
        console.print(f"{escape(name)}: {escape(str(shown if shown is not None else 'not installed'))}")


def format_outcome(outcome: Outcome) -> str:
    """A check's line: verdict, name, measured, bound, detail, in rich's markup."""
    measured = "" if outcome.measured is None else f"{outcome.measured:.3g} {outcome.unit}"
    bound = "" if outcome.bound is None else f" (at most {outcome.bound:.3g})"
    colour = COLOURS[outcome.verdict]
    parts = [outcome.name, measured + bound, outcome.detail]
    return f"[{colour}]{outcome.verdict}[/{colour}] " + escape(" | ".join(filter(None, parts)))


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome's fields; null for a figure that is not finite, which JSON can't hold."""
    fields = asdict(outcome)
    return fields | {"measured": outcome.measured if math.isfinite(outcome.measured or 0) else None}


def summary(outcomes: Sequence[Outcome], gpu: bool) -> str:
    """The last line: how many checks have each verdict, and what was not checked."""
    counts = ", ".join(
        f"{sum(outcome.verdict is verdict for outcome in outcomes)} {verdict.value}" for verdict in Verdict
    )
    return counts if gpu else f"{counts}. No GPU was found: nothing of the CUDA path was checked."
