"""The cost in quality of Attamba's smaller cache: `python -m benchmarks.attamba.quality`, hours on two cores.

Two experiments train small models from nothing: the recall task of benchmarks/attamba/recall.py, and, after that task,
text in which only the context tells the names (examples/package_text.py). Both compare a transformer, one with a
quarter of the KV, Attamba with P = 4, L = 32 and with P = 8, L = 16, and a control, Attamba with a window as long as
the sequence, which drops no key. All have equally many parameters, and all runs of a seed see the same tokens in the
same order. Each model has the learning rate that was the best in shorter runs with another seed.

The same command goes on after an interruption, and skips finished runs. It writes results/attamba_quality.json and
.png, and prints their tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attamba import recall
from benchmarks.attamba.measures import bits_per_byte, by_seed, compare, context_gains, evaluate, spans
from benchmarks.attamba.quality_tables import plot, tables
from benchmarks.report import OUT, write_json
from examples.package_text import load_package_text
from examples.stdlib_text import Text
from examples.train_attamba import make_model, parse, train

RUNS = Path(__file__).resolve().parents[2] / "build" / "attamba"
BASELINE = "transformer"
MODELS = {
    BASELINE: ["--model", "transformer"],
    "isokv4": ["--model", "transformer", "--kv-cut", "4"],
    "attamba-p4-l32": ["--chunk", "4", "--window", "32"],
    "attamba-p8-l16": ["--chunk", "8", "--window", "16"],
    "attamba-p4-l1024": ["--chunk", "4", "--window", "1024"],
}
PAIRS = (
    ("isokv4", BASELINE),
    ("attamba-p4-l32", BASELINE),
    ("attamba-p8-l16", BASELINE),
    ("attamba-p4-l1024", BASELINE),
    ("attamba-p4-l32", "isokv4"),
    ("attamba-p4-l32", "attamba-p4-l1024"),
)
TEXT = ["--text", "packages", "--autocast", "--dtype", "float32", *recall.SIZES, "--length", "1024", "--batch", "4"]
TEXT_STEPS, TEXT_SWEEP_STEPS = 600, 150
START_RATE, START_DISTANCE = 8e-3, 64
"""Of the recall task before the text. The sweep of the recall experiment found it the best, or close to the best."""
RATES = {"recall": ("4e-3", "8e-3", "1.6e-2"), "text": ("3e-3", "6e-3")}
"""The learning rates to choose from. The one with the least loss in a shorter run is used for all seeds."""
SWEEP_SEED, SWEEP_STAGES = 100, ((200, 64),)


@dataclass(frozen=True)
class Job:
    """One training run of an experiment, `recall` or `text`. Those with SWEEP_SEED are shorter."""

    task: str
    model: str
    rate: str
    seed: int

    @property
    def path(self) -> Path:
        return RUNS / f"{self.task}-{self.model}-lr{self.rate}-s{self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Return the result.json of the run, or None if it is not finished."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def text_arguments(self) -> argparse.Namespace:
        steps = TEXT_SWEEP_STEPS if self.seed == SWEEP_SEED else TEXT_STEPS
        tenth = str(max(1, steps // 10))
        run = {"--lr": self.rate, "--seed": str(self.seed), "--steps": str(steps), "--out": str(self.path)}
        pairs = [part for pair in (run | {"--warmup": tenth, "--report-every": tenth}).items() for part in pair]
        return parse([*TEXT, *MODELS[self.model], *pairs])

    def is_done(self) -> bool:
        evaluated = self.task == "recall" or self.seed == SWEEP_SEED or (self.path / "evaluation.pt").exists()
        return evaluated and self.result() is not None

    def loss(self) -> float:
        """Return the loss of a finished run, by which the learning rate is chosen."""
        result = self.result()
        if result is None:
            raise ValueError(f"{self.path} is not finished")
        return result["bits_per_byte"] if self.task == "text" else sum(result["loss"][-20:]) / 20


def run_job(job: Job) -> Job:
    """Train, or go on training, and evaluate; in a process of its own with one thread."""
    torch.set_num_threads(1)
    if job.task == "recall":
        stages = SWEEP_STAGES if job.seed == SWEEP_SEED else recall.STAGES
        result = recall.run(MODELS[job.model], job.rate, job.seed, stages)
        job.path.mkdir(parents=True, exist_ok=True)
        (job.path / "result.json").write_text(json.dumps(result) + "\n")
        return job
    args, text = job.text_arguments(), load_package_text()
    if job.result() is None:
        train(args, text, start=recall_start(job, args, text)["weights"])
    if job.seed != SWEEP_SEED:
        unfinished = job.path / "evaluation.part"
        torch.save(evaluate(job.path, text, args.windows, args.length), unfinished)
        unfinished.replace(job.path / "evaluation.pt")
    return job


def start_path(model: str, digest: str, seed: int) -> Path:
    return RUNS / f"start-{model}-{digest}-s{seed}.pt"


def recall_start(job: Job, args: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Return what training on text starts from: a model that has learned to recall the syllables of names.

    Without it, models of this size do not learn from a few million tokens to look for a name in the context.

    Returns:
        `weights`, and the `accuracy` of the recall at START_DISTANCE.
    """
    path = start_path(job.model, text.digest, job.seed)
    if not path.exists():
        vocabulary = len(text.token_bytes)
        model = make_model(args, vocabulary)
        keys = torch.arange(vocabulary - recall.KEYS, vocabulary)  # all syllables
        fillers = torch.arange(vocabulary - recall.KEYS - recall.FILLERS, vocabulary - recall.KEYS)
        tokens_of = torch.cat([keys, fillers])

        def predict(tokens: Tensor) -> Tensor:
            return model(tokens_of[tokens])[..., tokens_of]

        recall.train(model, START_RATE, job.seed, recall.STAGES, predict)
        model.eval()
        accuracy = recall.accuracy(predict, START_DISTANCE)
        unfinished = path.with_suffix(f".{job.rate}")  # runs with other learning rates may make it at the same time
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": model.state_dict(), "accuracy": accuracy}, unfinished)
        unfinished.replace(path)
    return torch.load(path)


def sweep(task: str, models: Iterable[str]) -> list[Job]:
    """Return the runs that the learning rates are chosen by."""
    return [Job(task, model, rate, SWEEP_SEED) for model in models for rate in RATES[task]]


def grid(task: str, models: Iterable[str], seeds: Sequence[int]) -> list[Job]:
    """Return the runs to compare, of the models whose sweep is finished; seed by seed."""
    jobs = []
    for seed in seeds:
        for model in models:
            runs = sweep(task, [model])
            if all(run.is_done() for run in runs):
                jobs.append(Job(task, model, min(runs, key=Job.loss).rate, seed))
    return jobs


def run_all(jobs: Sequence[Job], workers: ProcessPoolExecutor) -> None:
    """Run the jobs that are not done, and print the progress after each."""
    missing = [job for job in jobs if not job.is_done()]
    done, seconds = len(jobs) - len(missing), 0.0
    for future in as_completed([workers.submit(run_job, job) for job in missing]):
        job, done = future.result(), done + 1
        seconds += (job.result() or {})["seconds"]
        print(f"{job.path.name}: done, {done} of {len(jobs)} runs; {seconds / 60:.0f} CPU minutes now", flush=True)


def finished(jobs: Iterable[Job]) -> dict[str, dict[int, Job]]:
    """Return the finished runs, by model and seed."""
    found: dict[str, dict[int, Job]] = {}
    for job in filter(Job.is_done, jobs):
        found.setdefault(job.model, {})[job.seed] = job
    return found


def sweep_losses(task: str, models: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return the losses that the learning rates were chosen by, by model and rate."""
    return {model: {job.rate: job.loss() for job in sweep(task, [model])} for model in models}


def sizes(job: Job) -> dict[str, Any]:
    """Return the learning rate, the parameters and the cache of a run."""
    result, names = job.result() or {}, ("parameters", "kv_bytes_per_token", "kv_bytes_per_sequence")
    return {"learning_rate": job.rate} | {name: result[name] for name in names}


def collect_recall(jobs: Iterable[Job]) -> dict[str, Any]:
    """Return the accuracy of each model by distance, and the differences of the pairs."""
    runs = finished(jobs)
    found = {model: {seed: job.result() or {} for seed, job in of.items()} for model, of in runs.items()}
    distances = [str(distance) for distance in recall.DISTANCES]
    rows = {
        model: sizes(next(iter(runs[model].values())))
        | {"train_seconds": {seed: round(result["seconds"]) for seed, result in of.items()}}
        | {"accuracy": {d: by_seed({seed: result["accuracy"][d] for seed, result in of.items()}) for d in distances}}
        for model, of in found.items()
    }
    differences = {
        f"{one} - {other}": {
            d: by_seed({seed: found[one][seed]["accuracy"][d] - found[other][seed]["accuracy"][d] for seed in common})
            for d in distances
        }
        for one, other in PAIRS
        if (common := sorted(found.get(one, {}).keys() & found.get(other, {}).keys()))
    }
    settings = {"sizes": recall.SIZES, "stages": recall.STAGES, "step_tokens": recall.STEP_TOKENS}
    return settings | {"sweep": sweep_losses("recall", rows), "models": rows, "differences": differences}


def summarise(runs: dict[int, Job], found: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """Return the row of a model on text: its size, its cache, its bits per byte, and its gain from context."""
    results = {seed: job.result() or {} for seed, job in runs.items()}
    settings = next(iter(results.values()))["settings"]
    length = settings["length"]
    starts = {seed: torch.load(start_path(job.model, settings["text"], seed)) for seed, job in runs.items()}
    return sizes(next(iter(runs.values()))) | {
        "tokens": next(iter(results.values()))["tokens"],
        "train_seconds": {seed: round(result["seconds"]) for seed, result in results.items()},
        "recall_of_start": by_seed({seed: start["accuracy"] for seed, start in starts.items()}),
        "bits_per_byte": {
            f"{span[0]} to {span[1] - 1}": by_seed({seed: bits_per_byte(of, span) for seed, of in found.items()})
            for span in spans(length)
        },
        "context": context_gains(list(found.values())),
    }


def collect_text(jobs: Iterable[Job]) -> dict[str, Any]:
    """Return the bits of each model, and their ratios of the pairs by span of positions."""
    runs = finished(jobs)
    found = {
        model: {seed: torch.load(job.path / "evaluation.pt") for seed, job in of.items()} for model, of in runs.items()
    }
    ratios = {
        f"{one} over {other}": {
            f"{span[0]} to {span[1] - 1}": compare(found[one], found[other], span)
            for span in spans(parse([*TEXT, "--out", ""]).length)
        }
        for one, other in PAIRS
        if found.get(one, {}).keys() & found.get(other, {}).keys()
    }
    digest = {(job.result() or {})["settings"]["text"] for of in runs.values() for job in of.values()}
    return {
        "arguments": TEXT,
        "start": {"task": "recall", "stages": recall.STAGES, "learning_rate": START_RATE, "distance": START_DISTANCE},
        "text": ", ".join(sorted(digest)),
        "sweep": sweep_losses("text", runs),
        "models": {model: summarise(of, found[model]) for model, of in runs.items()},
        "bits_ratio": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each with one thread (default: %(default)s)")
    parser.add_argument("--only-present", action="store_true", help="tabulate finished runs, train none")
    args = parser.parse_args()
    if not args.only_present:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as workers:
            for task in args.tasks:
                run_all(sweep(task, args.models), workers)
                run_all(grid(task, args.models, args.seeds), workers)
    collectors = {"recall": collect_recall, "text": collect_text}
    jobs = {task: grid(task, args.models, args.seeds) for task in args.tasks}
    result = {task: collectors[task](jobs[task]) for task in args.tasks if any(map(Job.is_done, jobs[task]))}
    if not result:
        raise SystemExit(f"no finished run under {RUNS}")
    print(tables(result))
    path, figure = write_json("attamba_quality", result), OUT / "attamba_quality.png"
    plot(result, figure)
    print(f"{path} and {figure}")


if __name__ == "__main__":
    main()
