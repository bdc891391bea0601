"""Time to first token of one long prompt on one replica and on two: `python -m benchmarks.replicas.ttft`.

One `starling serve` runs two data-parallel replicas, each on its own core. Each repetition sends a new random prompt to
one replica (`star_replicas` 1) and then another one to both; the speed-up is the median of their ratios. The ideal
speed-up for k blocks is k / ceil((k + 1) / 2), as the second replica computes the anchor too. The bytes moved are
compared with those of ring attention, which sends each replica's KV to every other one. The second prompt is sent once
more, with all of it cached, to measure the other costs of a request. From this time, the times on one replica and the
rate of the transfer, benchmarks/replicas/model.py predicts the time on two. Writes results/star_replicas.json and .png;
rows that a run does not measure keep their figures. Needs two idle cores; takes some 20 minutes, with --quick (16k
tokens, once) 3.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.replicas.model import error, measured_prompt, predict
from benchmarks.replicas.server import SHARED_MEMORY, TCP, completion_request, counters, two_replicas
from benchmarks.report import saved_figure, write_row
from benchmarks.star_ttft import QUERY_TOKENS, RANDOM_LLAMA
from examples.server import Server
from starling.lab.statistics import median_ratio

NAME = "star_replicas"
BLOCKS = (8, 16, 32)
LENGTHS = (16_384, 32_768, 65_536)
KV_BYTES = 2 * RANDOM_LLAMA["num_hidden_layers"] * RANDOM_LLAMA["hidden_size"] * 4  # of a token, in float32
COUNTERS = ("starling:bytes_moved_total", "starling:move_seconds_total", "starling:split_seconds_total")


def first_token(server: Server, ids: list[int], blocks: int, replicas: int) -> float:
    """Return the seconds until the response of a completion of one token."""
    star = {
        "star": "on",
        "star_block_size": f"n/{blocks}",
        "star_query_tokens": QUERY_TOKENS,
        "star_replicas": replicas,
    }
    request = completion_request(server, ids, star, max_tokens=1)
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()
    return time.perf_counter() - started


def measure(
    server: Server, length: int, numbers: Sequence[int], repeats: int, transport: str
) -> Iterator[dict[str, Any]]:
    """Yield a row of the results for each of these numbers of blocks."""
    tokens = random.Random(length)
    for blocks in numbers:
        one: list[float] = []
        two: list[float] = []
        cached: list[float] = []
        counted: list[dict[str, float]] = []
        for repeat in range(repeats):
            first, second = ([tokens.randrange(3, 250) for _ in range(length)] for _ in range(2))
            one.append(first_token(server, first, blocks, 1))
            before = counters(server, COUNTERS)
            two.append(first_token(server, second, blocks, 2))
            counted.append({name: value - before[name] for name, value in counters(server, COUNTERS).items()})
            cached.append(first_token(server, second, blocks, 2))
            print(
                f"{length:,} tokens, n/B = {blocks}, {repeat + 1} of {repeats}: "
                f"{one[-1]:.2f} s on one, {two[-1]:.2f} s on two, {cached[-1]:.2f} s cached",
                flush=True,
            )
        yield summary(length, transport, blocks, one, two, cached, counted)


def summary(
    length: int,
    transport: str,
    blocks: int,
    one: list[float],
    two: list[float],
    cached: list[float],
    counted: list[dict[str, float]],
) -> dict[str, Any]:
    """Return a row of the results.

    Args:
        one, two, cached: seconds of each repetition on one replica, on two, and with all pages cached.
        counted: increase of the server's COUNTERS for each repetition.
    """
    moved, moving, parts = ([each[name] for each in counted] for name in COUNTERS)
    speedup, ideal = median_ratio(one, two), blocks / -(-(blocks + 1) // 2)
    row = {
        "tokens": length,
        "way": transport,
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
        "transport": lambda row: row["way"],
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
        "transfer": lambda row: f"{row['transfer_share']:.1%}",
    }
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=132).print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    rows = [row for row in rows if row["way"] == SHARED_MEMORY] or rows
    lengths, numbers = sorted({row["tokens"] for row in rows}), sorted({row["blocks"] for row in rows})
    width = 0.8 / len(numbers)
    with saved_figure(path, figsize=(6, 4.2)) as (_, axis):
        for index, blocks in enumerate(numbers):
            by_length = {row["tokens"]: row for row in rows if row["blocks"] == blocks}
            groups = [group for group, length in enumerate(lengths) if length in by_length]
            positions = [group + (index - (len(numbers) - 1) / 2) * width for group in groups]
            speedups = [by_length[lengths[group]]["speedup"] for group in groups]
            bars = axis.bar(positions, speedups, width * 0.9, label=f"n/B = {blocks}")
            ideal = next(iter(by_length.values()))["ideal"]
            left, right = ([position + side * width / 2 for position in positions] for side in (-1, 1))
            axis.hlines([ideal] * len(positions), left, right, color="black", linewidth=1)
            axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(lengths)), [f"{length // 1024}k" for length in lengths])
        axis.set_xlabel("prompt tokens (black: the ideal)")
        axis.set_ylabel("time to first token, one replica / two")
        axis.set_title("Star Attention over two replicas, one core each", fontsize=10)
        axis.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="16k tokens, once; writes nothing")
    parser.add_argument("--tcp", action="store_true", help="send pages over TCP, as between hosts; not in the plot")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, metavar="N", help="prompt lengths")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="K", help="n/B, 3 or more")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if min(args.blocks) < 3:
        parser.error("--blocks: a prompt of fewer than 3 blocks runs on one replica, as a second one gains nothing")
    lengths, repeats = (LENGTHS[:1], 1) if args.quick else (args.tokens, args.repeats)
    transport = TCP if args.tcp else SHARED_MEMORY
    with two_replicas(max(lengths) + 1024, transport) as server:
        for seed, replicas in enumerate((1, 1, 2, 2)):  # a warm-up, which also connects the replicas
            first_token(server, random.Random(seed).choices(range(3, 250), k=4096), 8, replicas)
        for length in lengths:
            for row in measure(server, length, args.blocks, repeats, transport):
                show([row])
                if not args.quick:
                    fields = {"query_tokens": QUERY_TOKENS, "kv_bytes_per_token": KV_BYTES}
                    rows, path = write_row(NAME, "rows", row, ("tokens", "way", "blocks"), **fields)
                    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
