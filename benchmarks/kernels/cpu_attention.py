"""The speedup of whole requests by the CPU attention op: `python -m benchmarks.kernels.cpu_attention`.

Each dtype has one engine. Every round runs each workload with the op and without it (`cpu_attention` auto and
`vllm`): the time to first token of a prompt under Star Attention and under dense attention, and a step of decode after
a long prompt. Writes results/cpu_attention.json and .png.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engine import Engine
from benchmarks.random_llama import make_random_llama
from benchmarks.report import OUT, plot_ratios, saved_figure, write_json
from benchmarks.star_ttft import ENGINE, RANDOM_LLAMA
from starling.attention_backends.kernels.cpu.paged_op import CPU_ATTENTION_SETTINGS
from starling.lab.statistics import ratio_interval

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STAR = {"star": "on", "star_block_size": 2048}
OURS, VLLMS = CPU_ATTENTION_SETTINGS
Seconds = dict[str, list[float]]  # setting -> seconds of each round


def run(dtype: str, tokens: int, context: int, steps: int, rounds: int) -> dict[str, Seconds]:
    """Return workload -> setting -> seconds."""
    chance = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [chance.randrange(256) for _ in range(length)]

    decode = f"a step of decode, {context:,} tokens before it"
    seconds: dict[str, Seconds] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_llama(Path(folder) / "llama", dtype=DTYPES[dtype], **RANDOM_LLAMA)
        arguments = {"dtype": dtype, "kv_cache_memory_bytes": 2 << 30, "enable_prefix_caching": True} | ENGINE
        with Engine(model, **arguments) as engine:
            before = prompt(context)
            for setting in CPU_ATTENTION_SETTINGS:
                engine.generate(before, cpu_attention=setting)  # the timed runs find it in the prefix cache
            for index in track(range(rounds), description=dtype):
                for setting in CPU_ATTENTION_SETTINGS[:: 1 if index % 2 else -1]:

                    def timed(workload: str, count: int, *args, setting=setting, **kwargs) -> None:
                        took = engine.generate(*args, cpu_attention=setting, **kwargs)["seconds"] / count
                        by_setting = seconds.setdefault(workload, {name: [] for name in CPU_ATTENTION_SETTINGS})
                        by_setting[setting].append(took)

                    timed(f"first token, star, {tokens:,} tokens", 1, prompt(tokens), STAR)
                    timed(f"first token, dense, {tokens:,} tokens", 1, prompt(tokens))
                    timed(decode, steps, before, max_tokens=steps)
    return seconds


def plot(figures: dict[str, dict[str, tuple[float, float, float]]], path: Path) -> None:
    with saved_figure(path, figsize=(8, 3)) as (_, axis):
        of_each = ((f"{workload}, {dtype}", ratio) for dtype, of in figures.items() for workload, ratio in of.items())
        plot_ratios(axis, dict(of_each))
        axis.set_xlabel("vLLM's op over Starling's (median, 95 % interval): more is faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a prompt that is timed (%(default)s)")
    parser.add_argument("--context", type=int, default=32_768, help="tokens before decode (%(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="of decode (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    args = parser.parse_args()
    seconds = {dtype: run(dtype, args.tokens, args.context, args.steps, args.rounds) for dtype in DTYPES}
    figures = {
        dtype: {workload: ratio_interval(times[OURS], times[VLLMS]) for workload, times in workloads.items()}
        for dtype, workloads in seconds.items()
    }
    table = Table("dtype", "workload", "vLLM's op, s", "Starling's, s", "ratio", "95 % interval")
    for dtype, workloads in seconds.items():
        for workload, times in workloads.items():
            median, lower, upper = figures[dtype][workload]
            shown = [f"{statistics.median(times[name]):.4f}" for name in (VLLMS, OURS)]
            table.add_row(dtype, workload, *shown, f"{median:.2f}", f"{lower:.2f} to {upper:.2f}")
    Console(width=130).print(table)
    path = write_json("cpu_attention", {"seconds": seconds, "vllm_over_starling": figures})
    plot(figures, OUT / "cpu_attention.png")
    print(f"{path} and {OUT / 'cpu_attention.png'}")


if __name__ == "__main__":
    main()
