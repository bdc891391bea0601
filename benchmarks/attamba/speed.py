"""Speed of Attamba and of a transformer of the same shape in vLLM: `python -m benchmarks.attamba.speed`.

The weights are random. Both engines run at the same time, and every measurement runs on one engine and then on the
other. The benchmark measures the seconds of a prompt's prefill and of a decode step after it, at several lengths. Then
it measures a batch of simultaneous requests that exceeds the transformer's cache. It writes results/attamba_speed.json
and .png; --quick takes two minutes and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.attamba.shapes import Shape, make_models, parse_shape
from benchmarks.engine import Engine
from benchmarks.report import OUT, plot_ratios, saved_figure, write_json
from starling.lab.statistics import ratio_interval

MODELS = ("transformer", "attamba")
STEPS = 24  # decode steps, timed together
ARGUMENTS: dict[str, Any] = {
    "max_num_batched_tokens": 2048,
    "additional_config": {"starling": {}},
    "enforce_eager": False,  # vLLM compiles both models, as it does by default
}
BATCH = {"requests": 32, "prompt_tokens": 960, "new_tokens": 64}
Seconds = dict[str, list[float]]
"""Seconds of each round, by model."""


def start(stack: contextlib.ExitStack, models: dict[str, Path], **arguments: Any) -> dict[str, Engine]:
    """Start an engine for each model; ``arguments`` are those of vllm.LLM."""
    return {name: stack.enter_context(Engine(models[name], **(ARGUMENTS | arguments))) for name in MODELS}


def one_request(engines: dict[str, Engine], lengths: list[int], rounds: int) -> dict[str, Seconds]:
    """Return the seconds of a whole prefill and of one decode step, by workload."""
    tokens, seconds = random.Random(0), {}
    for engine in engines.values():
        engine.generate([1] * 4096, max_tokens=4)
    for index in track(range(rounds), description="one request"):
        for length in lengths:
            prompt = [tokens.randrange(256) for _ in range(length)]
            for name in MODELS[:: 1 if index % 2 else -1]:
                prefill = engines[name].generate(prompt)["seconds"]
                # The prompt is now in the prefix cache, so the rest of its prefill takes equally long in both runs.
                one, more = (engines[name].generate(prompt, max_tokens=n)["seconds"] for n in (1, 1 + STEPS))
                for workload, time in (("prefill", prefill), ("decode", (more - one) / STEPS)):
                    times = seconds.setdefault(f"{workload}, {length:,} tokens", {model: [] for model in MODELS})
                    times[name].append(time)
    return seconds


def many_requests(engines: dict[str, Engine], rounds: int) -> Seconds:
    """Return the seconds until the last request of the batch is finished."""
    tokens, seconds = random.Random(1), {name: [] for name in MODELS}
    for index in track(range(rounds), description="many requests"):
        for name in MODELS[:: 1 if index % 2 else -1]:
            batch = [[tokens.randrange(256) for _ in range(BATCH["prompt_tokens"])] for _ in range(BATCH["requests"])]
            seconds[name].append(engines[name].generate_batch(batch, BATCH["new_tokens"])["seconds"])
    return seconds


def plot(figures: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Plot (median, lower, upper) of the ratio by workload."""
    with saved_figure(path, figsize=(8, 0.6 + 0.4 * len(figures))) as (_, axis):
        plot_ratios(axis, figures)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("time of the transformer / time of Attamba, 95 % interval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=parse_shape, default=Shape(), help="name=number,...: dim, layers, heads, ffn, ..."
    )
    parser.add_argument("--chunk", type=int, default=8, help="P (%(default)s)")
    parser.add_argument("--window", type=int, default=16, help="L (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32_768], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--batch-mib", type=int, default=32, help="KV cache of each engine for the batch (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round up to 8,192 tokens; writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.rounds = [length for length in args.lengths if length <= 8192], 1
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), args.shape, args.chunk, args.window, getattr(torch, args.dtype))
        with contextlib.ExitStack() as stack:
            sizes = {
                "kv_cache_memory_bytes": 1 << 30,
                "enable_prefix_caching": True,
                "max_model_len": max(args.lengths) + 64,
            }
            seconds = one_request(start(stack, models, dtype=args.dtype, **sizes), args.lengths, args.rounds)
        with contextlib.ExitStack() as stack:
            sizes = {
                "kv_cache_memory_bytes": args.batch_mib << 20,
                "max_model_len": 1024,
                "max_num_seqs": BATCH["requests"],
                "max_num_batched_tokens": 512,
            }
            engines = start(stack, models, dtype=args.dtype, **sizes)
            name = "{requests} requests at once, {prompt_tokens} tokens and {new_tokens} new each".format(**BATCH)
            seconds[name] = many_requests(engines, args.rounds)
    figures = {workload: ratio_interval(times["attamba"], times["transformer"]) for workload, times in seconds.items()}
    table = Table("", "transformer, s", f"Attamba P = {args.chunk}, s", "ratio", "95 % interval")
    for workload, times in seconds.items():
        median, lower, upper = figures[workload]
        medians = [f"{statistics.median(times[name]):.4f}" for name in MODELS]
        table.add_row(workload, *medians, f"{median:.2f}", f"{lower:.2f} to {upper:.2f}")
    Console(width=130).print(table)
    if args.quick:
        return
    settings = {"shape": asdict(args.shape), "batch": BATCH} | {
        name: value for name, value in vars(args).items() if name not in ("shape", "quick")
    }
    path = write_json("attamba_speed", {"settings": settings, "seconds": seconds, "transformer_over_attamba": figures})
    plot(figures, OUT / "attamba_speed.png")
    print(f"{path} and {OUT / 'attamba_speed.png'}")


if __name__ == "__main__":
    main()
