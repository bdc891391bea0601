"""A model of the time of one prompt over R replicas: `python -m benchmarks.replicas.model`.

A prompt has k star blocks with A = B, split as scheduler/planning/assignment.py splits them. Its time is the sum of the
blocks that one replica computes one after the other, the pages that the query's replica fetches, and the query.
benchmarks/replicas/ttft.py compares the model with its measurements. Run as a program, this file prints that comparison
from results/star_replicas.json, and the predictions for a prompt of 1M tokens on hypothetical replicas:
docs/replicas.md, "On paper".
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.report import numbers_table, read_json
from starling.scheduler.planning.assignment import ReplicaState, assign_blocks, completion_time

REPLICAS = (1, 2, 4, 8, 16, 31)


@dataclass(frozen=True)
class Prompt:
    """The costs of a prompt of k blocks on given replicas.

    Attributes:
        blocks: k.
        block_seconds: time of one block on one replica, attention and all other layers.
        block_bytes: bytes of a block's KV pages.
        bytes_per_second: rate at which pages are fetched. It does not depend on the number of replicas: all pages pass
            the link of the replica that fetches.
        query_seconds: time from the last page to the first token, and all other costs of a request.
    """

    blocks: int
    block_seconds: float
    block_bytes: float
    bytes_per_second: float
    query_seconds: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A prompt's predicted times in seconds, the bytes moved, and the rounds.

    ``rounds`` is the number of blocks that one replica computes one after the other, the anchor included.
    """

    rounds: int
    prefill: float
    moved: float
    transfer: float
    query: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.transfer + self.query


def predict(prompt: Prompt, replicas: int) -> Prediction:
    """Return the prediction for ``replicas`` idle replicas with empty caches."""
    sizes = np.ones(prompt.blocks)
    assignments = assign_blocks(sizes, 1.0, [ReplicaState()] * replicas, replicas)
    rounds = round(max(completion_time(sizes, assignment, 1.0, ReplicaState()) for assignment in assignments))
    moved = (prompt.blocks - assignments[0].stop) * prompt.block_bytes
    return Prediction(
        rounds, rounds * prompt.block_seconds, moved, moved / prompt.bytes_per_second, prompt.query_seconds
    )


def measured_prompt(row: dict[str, Any], bytes_per_token: float) -> Prompt:
    """Return the prompt of a row of star_replicas.json, from the times on one replica and the rate of the transfer.

    No other measurement on two replicas is used. If the row has no time of a cached prompt, the blocks take all of the
    time on one replica.
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
    """Return the FLOP of a block of B tokens after an anchor of B.

    It takes 2 per parameter and token, 4 per query-key pair and channel.
    """
    pairs = block * block + block * block / 2
    return 2 * model["parameters"] * block + 4 * model["layers"] * model["heads"] * model["head_dim"] * pairs


LLAMA_8B = {"parameters": 8_030_261_248, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128}


def paper_prompt(
    model: dict[str, int], tokens: int, blocks: int, *, flops: float, gbit: float, bytes_per_value: int = 2
) -> Prompt:
    """Return a prompt on replicas with ``flops`` FLOP/s each and links of ``gbit`` Gbit/s."""
    block = tokens // blocks
    token_bytes = 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * bytes_per_value
    return Prompt(blocks, block_flops(model, block) / flops, block * token_bytes, gbit * 1e9 / 8)


def paper_table(prompt: Prompt, numbers: Sequence[int] = REPLICAS) -> list[tuple[str, ...]]:
    """Return rows: replicas, rounds, prefill, moved, transfer, total, speed-up; texts.

    Some of them are in docs/replicas.md.
    """
    alone = predict(prompt, 1).seconds
    rows = []
    for number in numbers:
        prediction = predict(prompt, number)
        rows.append(
            (
                str(number),
                str(prediction.rounds),
                f"{prediction.prefill:.1f} s",
                f"{prediction.moved / 2**30:.0f} GiB",
                f"{prediction.transfer:.1f} s",
                f"{prediction.seconds:.1f} s",
                f"{alone / prediction.seconds:.1f}x",
            )
        )
    return rows


def error(predicted: float, measured: Sequence[float]) -> float:
    """Return the relative error of a prediction against the measured median; above 0: the prediction is too high."""
    return predicted / statistics.median(measured) - 1


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console(width=120)
    result = read_json("star_replicas")
    columns = ("tokens", "transport", "n/B", "one", "predicted", "measured", "error")
    table = numbers_table("Two replicas: predicted from one, and measured", columns)
    for row in result.get("rows", []):  # none where nothing was measured yet
        predicted = predict(measured_prompt(row, result["kv_bytes_per_token"]), 2).seconds
        one, two = statistics.median(row["seconds_on_one"]), statistics.median(row["seconds_on_two"])
        cells = f"{row['tokens']:,}", row["way"], str(row["blocks"]), f"{one:.2f}", f"{predicted:.2f}", f"{two:.2f}"
        table.add_row(*cells, f"{error(predicted, row['seconds_on_two']):+.1%}")
    console.print(table)
    for gbit in (100, 10):
        title = f"On paper: Llama-3.1-8B, bfloat16, 1M tokens, B = 32k, 400 TFLOP/s, {gbit} Gbit/s links"
        columns = ("replicas", "blocks one after another", "prefill", "moved", "transfer", "total", "speed-up")
        table = numbers_table(title, columns)
        for row in paper_table(paper_prompt(LLAMA_8B, 2**20, 32, flops=400e12, gbit=gbit)):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
