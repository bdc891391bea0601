"""`starling selftest`: checks this machine, and prints a line for each check."""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape

from starling.config.entry import CHOICES, GPU_ATTENTION
from starling.lab.selftest.check_prompts import LONGEST
from starling.lab.selftest.engine import EngineRun, read_result
from starling.lab.selftest.engine_checks import (
    DOCUMENTS,
    FP8_CAPABILITY,
    Engines,
    Setting,
    engine_checks,
    judge_tokens,
    make_engines,
    settings,
    steady_checks,
)
from starling.lab.selftest.kernels import kernel_checks, row_checks, tile_checks
from starling.lab.selftest.model import TINY, make_config, make_model, max_length, timed_shape, vocabulary
from starling.lab.selftest.result import (
    NO_GPU,
    Check,
    Outcome,
    Report,
    ReportError,
    Result,
    Skip,
    Verdict,
    count_verdicts,
    exit_code,
    figure,
    judge,
)
from starling.lab.selftest.served import MEMORY, served, served_checks
from starling.lab.selftest.speed import speed_checks

if TYPE_CHECKING:
    from starling.lab.selftest.engine_checks import Engines


MOVE_SECONDS = 300
GPU_MEMORY = {"gpu_memory_utilization": 0.5}  # for the tiny models; other programs may use the card


@contextmanager
def make_suite(
    model: str | None,
    *,
    gpu: bool,
    quick: bool,
    backend: str | None = None,
    gpu_attention: str | None = None,
) -> Iterator[tuple[list[Check], dict[str, Engines]]]:
    """Yield the checks, and the engines of each setting by its name. The random models exist while the context is open.

    Args:
        model: checkpoint for the engine checks, or None for random tiny weights.
        gpu: True to check a GPU, False for the CPU part.
        quick: one setting, and of the times those of a token alone.
        backend: vLLM's attention backend, or None for vLLM's choice.
        gpu_attention: the option of this name, of activated engines, or None for its default.
    """
    arguments: dict[str, Any] = {"attention_backend": backend} if backend else {}
    arguments["starling"] = {GPU_ATTENTION: gpu_attention} if gpu_attention else {}
    with tempfile.TemporaryDirectory(prefix="starling-selftest-") as temporary:
        folder = Path(temporary)
        checked, memory = model or make_tiny(folder, gpu), GPU_MEMORY if model is None and gpu else {}
        size, longest = vocabulary(checked), max_length(checked)
        checks, engines = [*kernel_checks(), *row_checks()], {}
        for setting in settings(gpu, quick):
            reason = setting_refusal(setting) or length_refusal(longest)
            if reason is not None:
                checks.append(Check(setting.name(), functools.partial(Skip, reason)))
                continue
            made = make_engines(checked, size, longest, setting, gpu, folder, **arguments | memory)
            engines[setting.name()] = made
            checks += engine_checks(setting.name(), made)
            if not (quick or (gpu and (setting.eager or setting.kv_dtype != "auto"))):
                checks += steady_checks(setting.name(), made.plain, made.ours, gpu)
        first = next(iter(engines.values()), None)
        run = None if first is None else served(first, folder, MEMORY[model is not None])
        checks += served_checks("as served", first, run) if first and run else []
        checks += two_gpu_checks(first, run)
        checks += timed_checks(model, gpu, folder, quick=quick, **arguments)
        if not quick:
            checks += tile_checks()
        yield checks, engines


def make_tiny(folder: Path, gpu: bool) -> str:
    """Make a tiny model with random weights for the engine checks."""
    return str(make_model(folder / "tiny", torch.bfloat16 if gpu else torch.float32, TINY))


def timed_checks(model: str | None, gpu: bool, folder: Path, **arguments: Any) -> list[Check]:
    """Return the measurements of times, with the model, or with random weights that vLLM makes in a shape that fits.

    Args:
        arguments: arguments of ``speed_checks``.
    """
    if model is not None:
        return speed_checks(model, vocabulary(model), max_length(model), gpu, folder, **arguments)
    shape, sizes = timed_shape(torch.cuda.get_device_properties(0).total_memory if gpu else 0)
    make_config(folder / "timed", torch.bfloat16 if gpu else torch.float32, sizes)
    timed, weights = str(folder / "timed"), f"random weights in the shape of {shape}"
    arguments |= {"load_format": "dummy", "note": weights}
    return speed_checks(timed, vocabulary(timed), max_length(timed), gpu, folder, **arguments)


def setting_refusal(setting: Setting) -> str | None:
    """Return why this card can't run a setting, or None if it can."""
    if setting.kv_dtype != "auto" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < FP8_CAPABILITY:
            return f"compute capability {capability} has no fp8: it needs {FP8_CAPABILITY}"
    return None


def length_refusal(longest: int) -> str | None:
    """Return why a model that takes ``longest`` tokens can't run the engine checks, or None if it can."""
    if longest >= LONGEST:
        return None
    return f"the model takes {longest:,} tokens at most, and the prompts of the engine checks have up to {LONGEST:,}"


def two_gpu_checks(engines: Engines | None, run: EngineRun | None) -> list[Check]:
    """Return the checks of two GPUs.

    Args:
        engines: engines of one GPU, or None where no setting can run.
        run: the engine that ``served`` made of them.
    """
    if engines is None or run is None:
        return [Check("two GPUs", functools.partial(Skip, "no engine of one GPU can run to compare with"))]
    parallel = replace(run, engine=run.engine | {"tensor_parallel_size": 2})
    checks = [Check("TP=2 equals TP=1", functools.partial(check_tensor_parallel, engines, parallel))]
    checks += served_checks("TP=2", engines, parallel)
    checks = [Check(f"two GPUs: {check.name}", functools.partial(on_two_gpus, check)) for check in checks]
    return [*checks, Check("two GPUs: moved pages are equal", check_moved_pages)]


def on_two_gpus(check: Check) -> Result | Skip:
    """Run a check; skipped where there are not two GPUs."""
    return two_gpus_missing() or check.run()


def two_gpus_missing() -> Skip | None:
    count = torch.cuda.device_count()
    return Skip(f"{count} GPUs, and two are needed") if count < 2 else None


def check_tensor_parallel(engines: Engines, parallel: EngineRun) -> Result:
    """Compare the star prompt, and documents where there are any, on two GPUs and on one.

    Args:
        parallel: the engine on two GPUs. Its adapter changes the model by zero.
    """
    batches = ["star"]
    engines.ours.result()
    if engines.documents_refusal() is None and parallel.refusal(DOCUMENTS) is None:
        batches += ["computed", "reordered, cold"]
    found, expected = (
        [output for batch in batches for output in engine.outputs(batch)] for engine in (parallel, engines.ours)
    )
    return judge_tokens(found, expected, engines.noise(), "with documents" if len(batches) > 1 else "star alone")


def check_moved_pages() -> Result | Skip:
    """Check scattered KV pages that one GPU's process reads from another one's."""
    missing = two_gpus_missing() or (None if find_spec("nixl") else Skip("NIXL is not installed"))
    return missing or judge_pages("cuda:0", "cuda:1")


def judge_pages(source: str, reader: str) -> Result:
    """Count the pages that differ between two processes, one on each of two devices; the detail has GB/s.

    Raises:
        EngineError: the pages can't be read; the message has the last lines that were printed.
    """
    arguments = ["-m", "starling.lab.selftest.moved_pages", source, reader]
    found = read_result("the process that reads the pages", arguments, MOVE_SECONDS, os.environ)
    speed = found["bytes"] / 1e9 / found["seconds"]
    detail = f"{found['bytes'] / 2**30:.3g} GiB of scattered pages in {found['seconds']:.3g} s, {speed:.3g} GB/s"
    return Result(found["different"], 0, "pages that differ", detail)


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
