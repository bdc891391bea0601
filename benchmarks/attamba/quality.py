"""The cost in quality of Attamba's smaller cache: `python -m benchmarks.attamba.quality`, hours on two cores.

The benchmark trains small models with examples/train_attamba.py on the sources of installed packages and a recall
task (examples/recall.py): a transformer, one with a quarter of the KV, Attamba with P = 4, L = 32 and
with P = 8, L = 16, and a control, Attamba with a window as long as the sequence, which drops no key. All have equally
many parameters, and all runs of a seed see the same tokens in the same order. Each model has the learning rate that was
the best in shorter runs with another seed.

The same command goes on after an interruption, and skips finished runs. It writes results/attamba_quality.json and
.png, and prints the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attamba.measures import accuracies, bits_per_byte, compare, context_gains, evaluate, spans
from benchmarks.attamba.quality_tables import plot, tables
from benchmarks.report import OUT, write_json
from examples.package_text import VOCABULARY, load_package_text
from examples.train_attamba import KV_BYTES, make_model, make_optimiser, parse, train, train_step

RUNS = Path(__file__).resolve().parents[2] / "build" / "attamba"
BASELINE = "transformer"
MODELS = {
    BASELINE: ["--model", "transformer"],
    "isokv4": ["--model", "transformer", "--kv-cut", "4"],
    "attamba-p4-l32": ["--chunk", "4", "--window", "32"],
    "attamba-p8-l16": ["--chunk", "8", "--window", "16"],
    "attamba-p4-l1024": ["--chunk", "4", "--window", "1024"],
}
SIZES = ["--dim", "192", "--ffn", "512", "--ssm-inner", "96", "--length", "1024", "--batch", "4", "--windows", "192"]
COMMON = ["--text", "packages", "--recall", "0.25", "--autocast", "--dtype", "float32", *SIZES]
STEPS, SWEEP_STEPS = 900, 180
RATES, SWEEP_SEED = ("1.5e-3", "3e-3", "6e-3"), 100
"""The learning rates to choose from. The one with the fewest validation bits in SWEEP_STEPS is used for all seeds."""
PAIRS = (
    ("isokv4", BASELINE),
    ("attamba-p4-l32", BASELINE),
    ("attamba-p8-l16", BASELINE),
    ("attamba-p4-l1024", BASELINE),
    ("attamba-p4-l32", "isokv4"),
    ("attamba-p4-l32", "attamba-p4-l1024"),
)
PAPER = {
    "long runs": {BASELINE: 20.72, "attamba-p4-l32": 21.74, "attamba-p8-l16": 23.28},
    "equal-KV study": {"isokv4": 33.49, "attamba-p4-l8": 33.54, "isokv8": 36.73, "attamba-p8-l8": 34.30},
}
"""Wikitext perplexity that the authors report: 64 M parameters, trained with the mixing of the released code."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    model: str
    rate: str
    seed: int
    steps: int

    @property
    def path(self) -> Path:
        return RUNS / f"{self.model}-lr{self.rate}-n{self.steps}-s{self.seed}"

    def arguments(self) -> argparse.Namespace:
        run = {"--lr": self.rate, "--seed": str(self.seed), "--steps": str(self.steps), "--out": str(self.path)}
        tenth = str(max(1, self.steps // 10))
        pairs = [part for pair in (run | {"--warmup": tenth, "--report-every": tenth}).items() for part in pair]
        return parse([*COMMON, *MODELS[self.model], *pairs])

    def result(self) -> dict[str, Any] | None:
        """The result.json of the run; None if it is not finished."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None


def run_job(job: Job) -> Job:
    """Train, or go on training, and evaluate; in a process of its own with one thread."""
    torch.set_num_threads(1)
    args, text = job.arguments(), load_package_text()
    if job.result() is None:
        train(args, text)
    evaluation = job.path / "evaluation.pt"
    if job.seed != SWEEP_SEED and not evaluation.exists():
        found = evaluate(job.path, text, args.windows, args.length)
        torch.save(found, evaluation.with_suffix(".part"))
        evaluation.with_suffix(".part").replace(evaluation)
    return job


def is_done(job: Job) -> bool:
    return job.result() is not None and (job.seed == SWEEP_SEED or (job.path / "evaluation.pt").exists())


def sweep(models: Iterable[str]) -> list[Job]:
    """The runs that the learning rates are chosen by."""
    return [Job(model, rate, SWEEP_SEED, SWEEP_STEPS) for model in models for rate in RATES]


def choose_rate(bits: dict[str, float]) -> str:
    """The learning rate with the fewest validation bits per byte."""
    return min(bits, key=lambda rate: bits[rate])


def sweep_bits(model: str) -> dict[str, float]:
    """Validation bits per byte by learning rate; KeyError-free only once the sweep of the model is finished."""
    results = {job.rate: job.result() for job in sweep([model])}
    return {rate: result["bits_per_byte"] for rate, result in results.items() if result}


def grid(models: Iterable[str], seeds: Sequence[int]) -> list[Job]:
    """The runs to compare, with the learning rates of the finished sweep; seed by seed."""
    rates = {model: choose_rate(sweep_bits(model)) for model in models}
    return [Job(model, rates[model], seed, STEPS) for seed in seeds for model in rates]


def seconds_per_step(models: Iterable[str]) -> dict[str, float]:
    """CPU seconds of a training step of each model: the faster of two steps after the first one."""
    torch.set_num_threads(1)
    seconds = {}
    for name in models:
        args = Job(name, RATES[0], 0, STEPS).arguments()
        model = make_model(args, VOCABULARY)
        optimiser, times = make_optimiser(model, args.lr), []
        for _ in range(3):
            started = time.process_time()
            train_step(model, optimiser, torch.randint(VOCABULARY, (args.batch, args.length + 1)), 0.0, args.autocast)
            times.append(time.process_time() - started)
        seconds[name] = min(times[1:])
    return seconds


class Progress:
    """Prints how many CPU minutes of training are done and left, from the seconds per step of finished runs.

    Args:
        models, seeds: of the whole grid.
        step_seconds: by model, an estimate to start from.
    """

    def __init__(self, models: Sequence[str], seeds: Sequence[int], step_seconds: dict[str, float]) -> None:
        self.step_seconds = dict(step_seconds)
        self.total = {model: SWEEP_STEPS * len(RATES) + STEPS * len(seeds) for model in models}
        self.done = dict.fromkeys(models, 0)
        self.seconds = dict.fromkeys(models, 0.0)

    def add(self, job: Job) -> None:
        """Count a finished run."""
        result = job.result()
        if result is None:
            raise ValueError(f"{job.path} is not finished")
        self.done[job.model] += job.steps
        self.seconds[job.model] += result["seconds"]
        self.step_seconds[job.model] = self.seconds[job.model] / self.done[job.model]

    def __str__(self) -> str:
        left = sum((self.total[model] - self.done[model]) * each for model, each in self.step_seconds.items())
        steps = f"{sum(self.done.values()):,} of {sum(self.total.values()):,} steps"
        return f"{steps}, {sum(self.seconds.values()) / 60:.0f} CPU minutes of training, about {left / 60:.0f} left"


def run_all(jobs: Sequence[Job], workers: ProcessPoolExecutor, progress: Progress) -> None:
    """Run the jobs that are not done, and print the progress after each."""
    for job in jobs:
        if is_done(job):
            progress.add(job)
    print(progress, flush=True)
    for future in as_completed([workers.submit(run_job, job) for job in jobs if not is_done(job)]):
        progress.add(future.result())
        print(f"{future.result().path.name}: done. {progress}", flush=True)


def summarise(runs: dict[int, Job], found: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """The row of a model: its size, its cache, its bits per byte, its gain from context, its recall."""
    results = {seed: job.result() or {} for seed, job in runs.items()}
    first = next(iter(results.values()))
    length, dim, layers = (first["settings"][name] for name in ("length", "dim", "layers"))
    cache_bytes = first["kv_bytes_per_token"] * length + first["kv_bytes_per_sequence"]
    return {
        "learning_rate": first["settings"]["lr"],
        "parameters": first["parameters"],
        "tokens": first["tokens"],
        "kv_bytes_per_token": first["kv_bytes_per_token"],
        "kv_bytes_per_sequence": first["kv_bytes_per_sequence"],
        # At most the bytes of all K|V rows: a window as long as the sequence holds every row once.
        "kv_bytes_of_training_length": min(cache_bytes, 2 * KV_BYTES * dim * layers * length),
        "train_seconds": {seed: round(result["seconds"]) for seed, result in results.items()},
        "bits_per_byte": {seed: bits_per_byte(of, (0, length)) for seed, of in found.items()},
        "by_position": {
            f"{span[0]} to {span[1] - 1}": statistics.mean(bits_per_byte(of, span) for of in found.values())
            for span in spans(length)[:-1]
        },
        "context": context_gains(list(found.values())),
        "recall": accuracies(list(found.values())),
    }


def collect(jobs: Iterable[Job]) -> dict[str, Any]:
    """The results of the finished jobs: a row a model, and the ratios of the pairs by span of positions."""
    finished: dict[str, dict[int, Job]] = {}
    for job in filter(is_done, jobs):
        finished.setdefault(job.model, {})[job.seed] = job
    found = {
        model: {seed: torch.load(job.path / "evaluation.pt") for seed, job in runs.items()}
        for model, runs in finished.items()
    }
    rows = {model: summarise(runs, found[model]) for model, runs in finished.items()}
    pairs = [(one, other) for one, other in PAIRS if found.get(one, {}).keys() & found.get(other, {}).keys()]
    length = parse([*COMMON, "--out", ""]).length
    ratios = {
        f"{one} over {other}": {
            f"{span[0]} to {span[1] - 1}": compare(found[one], found[other], span) for span in spans(length)
        }
        for one, other in pairs
    }
    return {
        "common_arguments": COMMON,
        "text": next(job.result() or {} for runs in finished.values() for job in runs.values())["settings"]["text"],
        "sweep": {model: sweep_bits(model) for model in rows},
        "models": rows,
        "bits_ratio": ratios,
        "paper_perplexity": PAPER,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each with one thread (default: %(default)s)")
    parser.add_argument("--only-present", action="store_true", help="tabulate finished runs, train none")
    args = parser.parse_args()
    if not args.only_present:
        progress = Progress(args.models, args.seeds, seconds_per_step(args.models))
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as workers:
            run_all(sweep(args.models), workers, progress)
            run_all(grid(args.models, args.seeds), workers, progress)
    jobs = grid([model for model in args.models if sweep_bits(model)], args.seeds)
    if not any(map(is_done, jobs)):
        raise SystemExit(f"no finished run under {RUNS}")
    result = collect(jobs)
    print(tables(result))
    path, figure = write_json("attamba_quality", result), OUT / "attamba_quality.png"
    plot(result, BASELINE, figure)
    print(f"{path} and {figure}")


if __name__ == "__main__":
    main()
