"""What Starling costs whoever does not use it: `python -m benchmarks.dense_cost`.

Three engines side by side, the same prompts: plain vLLM (no plugin loaded), Starling installed but not
activated, Starling activated with star off. Each round runs one prompt on each, in rotated order. Writes
results/dense_cost.json and .png: the ratio to plain vLLM with a 95 % interval, which should hold 1.0.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import OUT, ratio_interval, write_json
from benchmarks.star_ttft import RANDOM_LLAMA

ENGINES = {
    "plain vLLM": {"env": {"VLLM_PLUGINS": ""}},
    "installed, not activated": {},
    "activated, dense": {"additional_config": {"starling": {}}},
}
# Prefill of chunks, and steps of one token: (prompt tokens, new tokens).
WORKLOADS = {"prefill 4,096 tokens": (4096, 1), "decode 48 tokens": (256, 48)}


def run(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Workload -> engine -> seconds of each round."""
    seconds = {workload: {name: [] for name in ENGINES} for workload in WORKLOADS}
    tokens = random.Random(0)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        model = make_random_llama(Path(directory) / "llama", **RANDOM_LLAMA)
        engines = {
            name: stack.enter_context(
                Engine(
                    model,
                    dtype="float32",
                    kv_cache_memory_bytes=1 << 29,
                    max_num_batched_tokens=2048,
                    **arguments,
                )
            )
            for name, arguments in ENGINES.items()
        }
        names = list(engines)
        for workload, (prompt, new) in WORKLOADS.items():
            for name in names:
                engines[name].generate([1] * prompt, max_tokens=new)
            for index in track(range(rounds), description=workload):
                ids = [tokens.randrange(256) for _ in range(prompt)]
                turn = index % len(names)
                for name in names[turn:] + names[:turn]:
                    seconds[workload][name].append(engines[name].generate(ids, max_tokens=new)["seconds"])
    return seconds


def plot(figures: dict[str, dict[str, tuple[float, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3))
    labels = []
    for workload, engines in figures.items():
        for name, (median, lower, upper) in engines.items():
            row = len(labels)
            axis.errorbar(median, row, xerr=[[median - lower], [upper - median]], fmt="o", capsize=4, color="C0")
            labels.append(f"{workload}\n{name}")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlabel("time over plain vLLM's (median, 95 % interval)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    seconds = run(parser.parse_args().rounds)
    plain = next(iter(ENGINES))
    figures = {
        workload: {name: ratio_interval(runs[plain], times) for name, times in runs.items() if name != plain}
        for workload, runs in seconds.items()
    }
    table = Table(title="time over plain vLLM's")
    for column in ("workload", "engine", "median", "95 % interval"):
        table.add_column(column)
    for workload, engines in figures.items():
        for name, (median, lower, upper) in engines.items():
            table.add_row(workload, name, f"{median:.3f}", f"{lower:.3f} to {upper:.3f}")
    Console().print(table)
    path = write_json("dense_cost", {"seconds": seconds, "ratio_to_plain": figures})
    plot(figures, OUT / "dense_cost.png")
    print(f"{path} and {OUT / 'dense_cost.png'}")


if __name__ == "__main__":
    main()
