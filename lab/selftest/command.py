"""`starling selftest`: checks this machine, and prints a line for each check."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from starling.config.entry import CHOICES, GPU_ATTENTION
from starling.lab.selftest.result import (
    NO_GPU,
    Outcome,
    Report,
    ReportError,
    Verdict,
    count_verdicts,
    exit_code,
    figure,
    judge,
)

if TYPE_CHECKING:
    from starling.lab.selftest.engine_checks import Engines

COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.SKIP: "yellow"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `starling selftest`."""
    parser = argparse.ArgumentParser(
        prog="starling selftest",
        description="Checks whether Starling computes the right thing on this machine. Takes minutes.",
        epilog=f"Exit code: 0 passed, 1 a check failed, {NO_GPU} no GPU (the CPU part passed). See docs/selftest.md.",
    )
    parser.add_argument("model", nargs="?", help="a checkpoint for the engine checks; default: tiny random weights")
    parser.add_argument("--quick", action="store_true", help="one engine setting, and of the times those of a token")
    parser.add_argument("--attention-backend", metavar="NAME", help="vLLM's attention backend; default: its choice")
    parser.add_argument("--gpu-attention", choices=CHOICES[GPU_ATTENTION], help="kernels of all layers on a GPU")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="also write report.json and report.md; goes on where a run ended"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the checks; returns 0, 1 if one failed, or 2 without a GPU, where the CPU part passed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from starling.lab.machine import describe_machine, has_gpu
    from starling.lab.selftest.suite import make_suite

    console, gpu = Console(highlight=False, soft_wrap=True), has_gpu()
    machine = describe_machine()
    options = {"model": args.model, "backend": args.attention_backend, "gpu_attention": args.gpu_attention}
    try:
        report = Report(args.report, machine, options) if args.report else None
    except ReportError as error:
        parser.error(f"--report: {error}")
    print_table(console, machine if gpu else machine | {"cards": "none: the CPU part runs"})
    outcomes: list[Outcome] = []
    with make_suite(**options, gpu=gpu, quick=args.quick) as (checks, engines):
        for number, check in enumerate(checks, start=1):
            if report is not None and check.name in report.kept:
                outcomes.append(report.kept[check.name])
                console.print(format_outcome(outcomes[-1]) + " (from an earlier run)")
                continue
            with console.status(f"{number} of {len(checks)}: {escape(check.name)}"):
                outcomes.append(judge(check))
            console.print(format_outcome(outcomes[-1]))
            if report is not None:
                report.write(outcomes, environments(engines), None)
        code = exit_code(outcomes, gpu)
        if report is not None:
            report.write(outcomes, environments(engines), code)
    console.print(summary(outcomes, gpu))
    return code


def environments(engines: dict[str, Engines]) -> dict[str, dict[str, str]]:
    """Return the environment of each setting's activated engine, if it has run."""
    return {name: made.ours.environment() for name, made in engines.items() if made.ours.has_run}


def print_table(console: Console, rows: dict[str, Any]) -> None:
    """Print a name and its value a line."""
    for name, value in rows.items():
        shown = "\n".join(value) if isinstance(value, list) else value
        console.print(f"{escape(name)}: {escape(str(shown if shown is not None else 'not installed'))}")


def format_outcome(outcome: Outcome) -> str:
    """Return a check's line: verdict, name, measured, bound, detail, in rich's markup."""
    colour = COLOURS[outcome.verdict]
    parts = [outcome.name, figure(outcome), outcome.detail]
    return f"[{colour}]{outcome.verdict}[/{colour}] " + escape(" | ".join(filter(None, parts)))


def summary(outcomes: Sequence[Outcome], gpu: bool) -> str:
    """Return the last line: how many checks have each verdict, and what was not checked."""
    counts = count_verdicts(outcomes)
    return counts if gpu else f"{counts}. No GPU was found: nothing of the CUDA path was checked."
