"""The time of one prompt over R replicas, on paper: `python -m benchmarks.replicas_model`.

k star blocks with A = B, cut as scheduler/spread.py cuts them, cost the blocks that one replica computes after one
another, then the pages that the query's replica reads, then the query. benchmarks/star_replicas.py holds this against
what it measures. Run as a program it prints that, from results/star_replicas.json, and a prompt of 1M tokens on
replicas that nobody here has: docs/replicas.md, "On paper".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import OUT
from scheduler.spread import Replica, run_work, spread_blocks

REPLICAS = (1, 2, 4, 8, 16, 31)


@dataclass(frozen=True)
class Prompt:
    """What a prompt of k blocks costs on given replicas.

    Attributes:
        blocks: k.
        block_seconds: of one block on one replica: attention, and the rest.
        block_bytes: of its KV pages.
        bytes_per_second: at which pages are read, from however many replicas: all come over the reader's link.
        query_seconds: from the last page to the first token, and what a request costs besides.
    """

    blocks: int
    block_seconds: float
    block_bytes: float
    bytes_per_second: float
    query_seconds: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Of a prompt over some replicas; times are seconds."""

    rounds: int  # blocks that one replica computes after one another, the anchor among them
    prefill: float
    moved: float  # bytes
    transfer: float
    query: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.transfer + self.query


def predict(prompt: Prompt, replicas: int) -> Prediction:
    """Over idle replicas with empty caches."""
    runs = spread_blocks(prompt.blocks, 1.0, [Replica()] * replicas, replicas)
    rounds = round(max(run_work(run, 1.0, Replica()) for run in runs))
    moved = (prompt.blocks - runs[0].stop) * prompt.block_bytes
    return Prediction(
        rounds, rounds * prompt.block_seconds, moved, moved / prompt.bytes_per_second, prompt.query_seconds
    )


def measured_prompt(row: dict[str, Any], bytes_per_token: float) -> Prompt:
    """From a row of star_replicas.json: times on one replica, the rate of the transfer, and nothing else of two.

    Where the time of a cached prompt was not measured, all of the time is the blocks'.
    """
    query = statistics.median(row["seconds_cached"] or [0.0])
    return Prompt(
        blocks=row["blocks"],
        block_seconds=(statistics.median(row["seconds_on_one"]) - query) / row["blocks"],
        block_bytes=row["tokens"] * bytes_per_token / row["blocks"],
        bytes_per_second=row["bytes_per_second"],
        query_seconds=query,
    )


def block_flops(model: dict[str, int], block: int) -> float:
    """Of a block of B tokens behind an anchor of B: 2 a parameter and token, 4 a pair of query and key and channel."""
    pairs = block * block + block * block / 2
    return 2 * model["parameters"] * block + 4 * model["layers"] * model["heads"] * model["head_dim"] * pairs


LLAMA_8B = {"parameters": 8_030_261_248, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128}


def paper_prompt(
    model: dict[str, int], tokens: int, blocks: int, *, flops: float, gbit: float, bytes_per_value: int = 2
) -> Prompt:
    """A prompt on replicas of so many FLOP/s each, with links of so many Gbit/s."""
    block = tokens // blocks
    token_bytes = 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * bytes_per_value
    return Prompt(blocks, block_flops(model, block) / flops, block * token_bytes, gbit * 1e9 / 8)


def paper_table(prompt: Prompt, numbers: Sequence[int] = REPLICAS) -> list[tuple[str, ...]]:
    """Rows of docs/replicas.md: replicas, rounds, prefill, moved, transfer, in all, speed-up."""
    alone = predict(prompt, 1).seconds
    rows = []
    for number in numbers:
        told = predict(prompt, number)
        rows.append(
            (
                str(number),
                str(told.rounds),
                f"{told.prefill:.1f} s",
                f"{told.moved / 2**30:.0f} GiB",
                f"{told.transfer:.1f} s",
                f"{told.seconds:.1f} s",
                f"{alone / told.seconds:.1f}x",
            )
        )
    return rows


def error(predicted: float, measured: Sequence[float]) -> float:
    """How far a prediction is from the median measured, in parts of that: above 0 where it says too much."""
    return predicted / statistics.median(measured) - 1


def main() -> None:
    console = Console(width=120)
    result = json.loads((OUT / "star_replicas.json").read_text())
    table = Table(title="Two replicas: predicted from one, and measured")
    for column in ("tokens", "way", "n/B", "one", "predicted", "measured", "error"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        told = predict(measured_prompt(row, result["kv_bytes_per_token"]), 2).seconds
        one, two = statistics.median(row["seconds_on_one"]), statistics.median(row["seconds_on_two"])
        gap = error(told, row["seconds_on_two"])
        cells = f"{row['tokens']:,}", row["way"], str(row["blocks"]), f"{one:.2f}", f"{told:.2f}", f"{two:.2f}"
        table.add_row(*cells, f"{gap:+.1%}")
    console.print(table)
    for gbit in (100, 10):
        title = f"On paper: Llama-3.1-8B, bfloat16, 1M tokens, B = 32k, 400 TFLOP/s, {gbit} Gbit/s links"
        table = Table(title=title)
        for column in ("replicas", "blocks one after another", "prefill", "moved", "transfer", "in all", "speed-up"):
            table.add_column(column, justify="right")
        for cells in paper_table(paper_prompt(LLAMA_8B, 2**20, 32, flops=400e12, gbit=gbit)):
            table.add_row(*cells)
        console.print(table)


if __name__ == "__main__":
    main()
