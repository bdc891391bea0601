"""Gain and cost of the default plan on a real model: `python -m benchmarks.default_plan MODEL`.

One server answers generated prompts (needles, variables, code) dense and with the default plan, as `starling eval`
does. Then prompts are sent with nothing cached, in turns, for the time to their first token. Writes
results/default_plan_MODEL.json and .png, the picture of README.md. With Qwen2.5-Coder-0.5B on two cores: 30 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import run_eval
from benchmarks.report import saved_figure, write_row
from examples.server import serving
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.prompt_options import DENSE, parse_plan
from starling.lab.evaluation.prompts import task_prompts
from starling.lab.evaluation.tasks import choose_tasks
from starling.lab.statistics import median_ratio

TASKS = "niah_single_2,niah_multikey_1,niah_multiquery,vt,code"
TIMED_TASK = "niah_single_2"
PLAN = "default"


def measure_answers(url: str, length: int, prompts: int, folder: Path) -> dict[str, Any]:
    """Return the row of `starling eval` over all tasks for the default plan."""
    results, _ = run_eval(["--base-url", url], [PLAN], TASKS, length, prompts, folder)
    (row,) = [cell for cell in results["cells"] if cell["plan"] == PLAN and cell["task"] == "all"]
    return row


async def measure_times(url: str, length: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds to the first token of prompts of this length, dense and with the default plan, in turns."""
    times: dict[str, list[float]] = {"dense": [], PLAN: []}
    (task,) = choose_tasks([TIMED_TASK])
    async with Client(url) as client:
        tokenizer = client.tokenizer
        prompts = await task_prompts(task, length, rounds, seed=1, prompt_format="chat", tokenizer=tokenizer)
        for prompt in prompts:
            for name, plan in (("dense", DENSE), (PLAN, parse_plan(PLAN))):
                times[name].append(await client.seconds_to_first_token(prompt.token_ids, plan))
    return times


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    with saved_figure(path, 1, 2, figsize=(9, 2.6)) as (_, (left, right)):
        labels = [f"{row['length']:,} tokens" for row in rows]
        places = range(len(rows))
        for offset, (name, label, colour) in enumerate(
            (("dense", "dense", "#999999"), (PLAN, "Star Attention, default", "#1f77b4"))
        ):
            seconds = [statistics.median(row["seconds"][name]) for row in rows]
            left.bar([place + 0.4 * offset for place in places], seconds, 0.38, label=label, color=colour)
            scores = [100 * row["answers"]["dense_score" if name == "dense" else "score"] for row in rows]
            right.bar([place + 0.4 * offset for place in places], scores, 0.38, label=label, color=colour)
        left.set_title("the first token comes sooner")
        left.set_ylabel("seconds, less is better")
        right.set_title("the answers stay")
        right.set_ylabel("right answers, %")
        right.set_ylim(0, 100)
        for axis in (left, right):
            axis.set_xticks([place + 0.2 for place in places], labels)
        left.legend(loc="upper left", frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens (%(default)s)")
    parser.add_argument("--prompts", type=int, default=5, help="of each of the five tasks (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="prompts that are timed (%(default)s)")
    args = parser.parse_args()
    options = ["--star", "auto", "--star-min-tokens", "2048", "--max-model-len", str(max(args.lengths) + 512)]
    name = f"default_plan_{args.model.name}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with serving(args.model, *options, log=folder / "log", grpc_port=None) as server:
            for length in args.lengths:
                answers = measure_answers(server.http, length, args.prompts, folder / str(length))
                seconds = asyncio.run(measure_times(server.http, length, args.rounds))
                ratio = median_ratio(seconds["dense"], seconds[PLAN])
                row = {"length": length, "answers": answers, "seconds": seconds, "ratio": ratio}
                rows, path = write_row(name, "rows", row, ["length"])
    show(rows)
    plot(rows, path.with_suffix(".png"))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("prompt", "first token, dense", "star", "ratio", "right, dense", "star", "prompts", "attention work")
    for row in rows:
        seconds, answers = row["seconds"], row["answers"]
        medians = [f"{statistics.median(seconds[way]):.1f} s" for way in ("dense", PLAN)]
        scores = [f"{100 * answers[way]:.0f} %" for way in ("dense_score", "score")]
        work = [str(answers["prompts"]), f"{100 * answers['attended_keys']:.0f} %"]
        table.add_row(f"{row['length']:,}", *medians, f"{row['ratio']:.2f}x", *scores, *work)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
