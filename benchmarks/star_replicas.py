"""Time to first token of one long prompt over one and over two replicas: `python -m benchmarks.star_replicas`.

One `starling serve` with two data-parallel replicas, each on a core of its own. Each repetition sends a new random
prompt to one replica (`star_replicas` 1) and another one to both, right after one another; the speed-up is the median
of their ratios. The ideal is k / ceil((k + 1) / 2) for k blocks: the second replica computes the anchor too. Bytes
moved are held against ring attention's, in which each replica's KV visits every other one. The same prompt once more,
all of it cached, says what a request costs besides; from that, the times on one replica and the rate of the transfer
benchmarks/replicas_model.py predicts the time on two. Writes results/star_replicas.json and .png; what was measured
before and is not now keeps its figures. Needs two cores to itself; some 20 minutes, with --quick (16k tokens, once) 3.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.random_llama import make_random_llama
from benchmarks.replicas_model import error, measured_prompt, predict
from benchmarks.report import median_ratio, put_row, read_json, write_json
from benchmarks.star_ttft import QUERY_TOKENS, RANDOM_LLAMA
from examples.server import Server, end_on_signals, serving

NAME = "star_replicas"
BLOCKS = (8, 16, 32)
LENGTHS = (16_384, 32_768, 65_536)
KV_BYTES = 2 * RANDOM_LLAMA["num_hidden_layers"] * RANDOM_LLAMA["hidden_size"] * 4  # of a token, in float32
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "2048", "--max-num-seqs", "4"]
OPTIONS += ["--data-parallel-size", "2"]
SHARED_MEMORY = "shared memory"
COUNTERS = ("starling:bytes_moved_total", "starling:move_seconds_total", "starling:spread_seconds_total")


def first_token(server: Server, ids: list[int], blocks: int, replicas: int) -> float:
    """Seconds until a completion of one token has come."""
    star = {"star": "on", "star_num_blocks": blocks, "star_query_tokens": QUERY_TOKENS, "star_replicas": replicas}
    body = {"model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "vllm_xargs": star}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.http}/v1/completions", data, {"content-type": "application/json"})
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()
    return time.perf_counter() - started


def counters(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=10) as response:
        lines = [line.split() for line in response.read().decode().splitlines() if line.startswith(COUNTERS)]
    return {name: float(value) for name, value in lines}


def measure(server: Server, length: int, numbers: Sequence[int], repeats: int, way: str) -> Iterator[dict[str, Any]]:
    """A row for each number of blocks; ``way`` is how pages go."""
    tokens = random.Random(length)
    for blocks in numbers:
        one: list[float] = []
        two: list[float] = []
        cached: list[float] = []
        told: list[dict[str, float]] = []
        for repeat in range(repeats):
            first, second = ([tokens.randrange(3, 250) for _ in range(length)] for _ in range(2))
            one.append(first_token(server, first, blocks, 1))
            before = counters(server)
            two.append(first_token(server, second, blocks, 2))
            told.append({name: value - before[name] for name, value in counters(server).items()})
            cached.append(first_token(server, second, blocks, 2))
            print(
                f"{length:,} tokens, n/B = {blocks}, {repeat + 1} of {repeats}: "
                f"{one[-1]:.2f} s on one, {two[-1]:.2f} s on two, {cached[-1]:.2f} s cached",
                flush=True,
            )
        yield summary(length, way, blocks, one, two, cached, told)


def summary(
    length: int,
    way: str,
    blocks: int,
    one: list[float],
    two: list[float],
    cached: list[float],
    told: list[dict[str, float]],
) -> dict[str, Any]:
    """A row of the results: seconds on one replica, on two, with all pages cached, and what the counters grew by."""
    moved, moving, parts = ([each[name] for each in told] for name in COUNTERS)
    speedup, ideal = median_ratio(one, two), blocks / -(-(blocks + 1) // 2)
    row = {
        "tokens": length,
        "way": way,
        "blocks": blocks,
        "seconds_on_one": one,
        "seconds_on_two": two,
        "seconds_of_parts": parts,
        "seconds_cached": cached,
        "speedup": speedup,
        "ideal": ideal,
        "of_ideal": speedup / ideal,
        "bytes_moved": statistics.median(moved),
        "of_ring_attention": statistics.median(moved) / (length * KV_BYTES),
        "bytes_per_second": sum(moved) / sum(moving),
        "transfer_share": statistics.median(a / b for a, b in zip(moving, two, strict=True)),
    }
    seconds = predict(measured_prompt(row, KV_BYTES), 2).seconds
    return row | {"predicted_seconds": seconds, "prediction_error": error(seconds, two)}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="One prompt over two replicas, one core each")
    columns = {
        "tokens": lambda row: f"{row['tokens']:,}",
        "way": lambda row: row["way"],
        "n/B": lambda row: str(row["blocks"]),
        "one": lambda row: f"{statistics.median(row['seconds_on_one']):.2f}",
        "two": lambda row: f"{statistics.median(row['seconds_on_two']):.2f}",
        "predicted": lambda row: f"{row['predicted_seconds']:.2f}",
        "error": lambda row: f"{row['prediction_error']:+.1%}",
        "speed-up": lambda row: f"{row['speedup']:.2f}x",
        "ideal": lambda row: f"{row['ideal']:.2f}x",
        "MB moved": lambda row: f"{row['bytes_moved'] / 1e6:.0f}",
        "of ring": lambda row: f"{row['of_ring_attention']:.0%}",
        "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.2f}",
        "share": lambda row: f"{row['transfer_share']:.1%}",
    }
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=132).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4.2))
    rows = [row for row in rows if row["way"] == SHARED_MEMORY] or rows
    lengths, numbers = sorted({row["tokens"] for row in rows}), sorted({row["blocks"] for row in rows})
    width = 0.8 / len(numbers)
    for index, blocks in enumerate(numbers):
        of_blocks = {row["tokens"]: row for row in rows if row["blocks"] == blocks}
        there = [place for place, length in enumerate(lengths) if length in of_blocks]
        places = [place + (index - (len(numbers) - 1) / 2) * width for place in there]
        speedups = [of_blocks[lengths[place]]["speedup"] for place in there]
        bars = axis.bar(places, speedups, width * 0.9, label=f"n/B = {blocks}")
        ideal = next(iter(of_blocks.values()))["ideal"]
        left, right = [place - width / 2 for place in places], [place + width / 2 for place in places]
        axis.hlines([ideal] * len(places), left, right, color="black", linewidth=1)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(lengths)), [f"{length // 1024}k" for length in lengths])
    axis.set_xlabel("prompt tokens (black: the ideal)")
    axis.set_ylabel("time to first token, one replica / two")
    axis.set_title("Star Attention over two replicas, one core each", fontsize=10)
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="16k tokens, once; writes nothing")
    parser.add_argument("--tcp", action="store_true", help="let pages go over TCP, as between hosts; the plot has none")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, metavar="N", help="prompt lengths")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="K", help="n/B, 3 or more")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if min(args.blocks) < 3:
        parser.error("--blocks: fewer than 3 blocks are not worth two replicas, so they stay on one")
    end_on_signals()
    lengths, repeats = (LENGTHS[:1], 1) if args.quick else (args.tokens, args.repeats)
    way = "TCP" if args.tcp else SHARED_MEMORY
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if args.tcp:
        os.environ["UCX_TLS"] = "tcp"
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_llama(Path(folder) / "llama", **RANDOM_LLAMA)
        options = [*OPTIONS, "--max-model-len", str(max(lengths) + 1024)]
        print(f"Starting two replicas, pages go over {way}", flush=True)
        with serving(model, *options, log=Path(folder) / "log", seconds=300) as server:
            for seed, replicas in enumerate((1, 1, 2, 2)):  # both are warm, and the way between them is open
                first_token(server, random.Random(seed).choices(range(3, 250), k=4096), 8, replicas)
            for length in lengths:
                for row in measure(server, length, args.blocks, repeats, way):
                    show([row])
                    if not args.quick:
                        keep(row)


def keep(row: dict[str, Any]) -> None:
    """Write a row to the results, in the place of the one measured before."""

    def place(of: dict[str, Any]) -> tuple:
        return of["tokens"], of["way"], of["blocks"]

    rows = put_row(read_json(NAME).get("rows", []), row, place)
    path = write_json(NAME, {"query_tokens": QUERY_TOKENS, "kv_bytes_per_token": KV_BYTES, "rows": rows})
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
