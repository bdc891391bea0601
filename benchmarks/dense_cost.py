"""The cost of Starling for requests that do not use it: `python -m benchmarks.dense_cost`.

Three engines run the same prompts: plain vLLM (no plugin loaded), Starling installed but not activated, and Starling
activated with star off. Each round runs one prompt on each engine, in rotated order. The engines are restarted several
times, also in rotated order. Writes results/dense_cost.json and .png: the ratio to plain vLLM with a 95 % interval,
which should contain 1.0.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import numbers_table, plot_ratios, saved_figure, write_json
from benchmarks.star_ttft import RANDOM_LLAMA
from starling.lab.statistics import ratio_interval

ENGINES = {
    "plain vLLM": {"env": {"VLLM_PLUGINS": ""}},
    "installed, not activated": {},
    "activated, dense": {"additional_config": {"starling": {}}},
}
ARGUMENTS = {
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 29,
    "max_model_len": 8192,
    "max_num_batched_tokens": 2048,
}
# (prompt tokens, new tokens): prefill in chunks, and steps of one token.
WORKLOADS = {"prefill 4,096 tokens": (4096, 1), "decode 48 tokens": (256, 48)}


def measure(starts: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return workload -> engine -> seconds of each round; ``rounds`` rounds after each of ``starts`` starts."""
    seconds: dict[str, dict[str, list[float]]] = {workload: {name: [] for name in ENGINES} for workload in WORKLOADS}
    names = list(ENGINES)
    with tempfile.TemporaryDirectory() as directory:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        for start in range(starts):
            # A process keeps the memory that it got at its start, which makes it a few per cent faster or slower.
            order = names[start % len(names) :] + names[: start % len(names)]
            with contextlib.ExitStack() as stack:
                engines = {
                    name: stack.enter_context(Engine(model, **ARGUMENTS, **ENGINES[name]))
                    for name in track(order, description=f"start {start + 1} of {starts}")
                }
                for workload, (prompt, new) in WORKLOADS.items():
                    interleave(engines, prompt, new, rounds, seconds[workload], seed=start)
    return seconds


def interleave(
    engines: dict[str, Engine], prompt: int, new: int, rounds: int, seconds: dict[str, list[float]], seed: int
) -> None:
    """Run the same prompts on every engine, in rotated order, after one prompt as a warm-up."""
    tokens, names = random.Random(seed), list(engines)
    for name in names:
        engines[name].generate([1] * prompt, max_tokens=new)
    for index in track(range(rounds), description=f"{prompt:,} + {new} tokens"):
        ids = [tokens.randrange(256) for _ in range(prompt)]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(engines[name].generate(ids, max_tokens=new)["seconds"])


def plot(figures: dict[str, dict[str, tuple[float, float, float]]], path: Path, baseline: str = "plain vLLM") -> None:
    """Plot workload -> engine -> (median, lower, upper) of its time divided by the baseline's."""
    with saved_figure(path, figsize=(7, 3)) as (_, axis):
        of_each = ((f"{workload}\n{name}", ratio) for workload, of in figures.items() for name, ratio in of.items())
        plot_ratios(axis, dict(of_each))
        axis.set_xlabel(f"time over {baseline}'s (median, 95 % interval)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="after each start")
    args = parser.parse_args()
    seconds = measure(args.starts, args.rounds)
    plain = next(iter(ENGINES))
    figures = {
        workload: {name: ratio_interval(runs[plain], times) for name, times in runs.items() if name != plain}
        for workload, runs in seconds.items()
    }
    table = numbers_table("time over plain vLLM's", ("workload", "engine", "median", "95 % interval"))
    for workload, engines in figures.items():
        for name, (median, lower, upper) in engines.items():
            table.add_row(workload, name, f"{median:.3f}", f"{lower:.3f} to {upper:.3f}")
    Console().print(table)
    path = write_json("dense_cost", {"seconds": seconds, "ratio_to_plain": figures})
    plot(figures, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
