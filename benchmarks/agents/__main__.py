"""Coding agents on one server, in simulated time: `python -m benchmarks.agents`.

A trace of agents' requests (benchmarks/agents/trace.py) is played on vLLM's scheduler and on Starling's. The schedulers
are the real ones, with their prefix caches. The model is arithmetic: how long a step takes is calculated for
Llama-3.1-70B on eight H100s (benchmarks/agents/cost.py). Writes results/agents.json and .png. 24 sessions, some
thousand requests, take some 4 minutes for each setting.

With --compaction, sessions are summarised and start anew (benchmarks/agents/compaction.py), and tokens are counted.
Writes results/agents_compaction.json and .png; a minute for each setting.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.agents import compaction
from benchmarks.agents.cost import Machine
from benchmarks.agents.simulator import SETTINGS, STEP, play
from benchmarks.agents.trace import Shape, make_trace, summary
from benchmarks.report import legend_below, numbers_table, plot_two_times, saved_figure, write_json

COLUMNS = {
    "first_token_p50": "first token p50",
    "first_token_p90": "p90",
    "first_token_p99": "p99",
    "pause_p50": "pause p50",
    "pause_p99": "p99",
    "pause_p999": "p99.9",
    "tokens_per_second": "tokens/s",
    "cached": "cached",
}


def show(rows: dict[str, dict[str, Any]]) -> None:
    table = numbers_table("seconds", ("scheduling", *COLUMNS.values()))
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3g}" for key in COLUMNS))
    Console().print(table)


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    panels = (("first_token", "p99", "to the first token"), ("pause", "p999", "between two tokens"))
    with saved_figure(path, 1, 2, figsize=(9, 3), sharey=True) as (figure, axes):
        for axis, (key, high, title) in zip(axes, panels, strict=True):
            worst = {"p99": "one in a hundred is later", "p999": "one in a thousand is later"}[high]
            values = {name: (row[f"{key}_p50"], row[f"{key}_{high}"]) for name, row in rows.items()}
            plot_two_times(axis, values, f"seconds {title}")
            legend_below(axis, "median", worst)
        figure.suptitle("Agents and chats on one server, by who schedules")


def main() -> None:
    names = list(SETTINGS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=24, help="agents' sessions in the trace")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--settings", nargs="*", choices=names, default=names, help="settings to play")
    parser.add_argument("--workers", type=int, default=1, help="settings played at the same time")
    parser.add_argument("--compaction", action="store_true", help="count what sessions that start anew compute")
    args = parser.parse_args()
    if args.compaction:
        rows = played(compaction.play, list(compaction.SERVED), args.workers)
        compaction.plot(rows, write_json("agents_compaction", compaction.summary(rows)).with_suffix(".png"))
        table = numbers_table("tokens, mean", ("served by", *next(iter(rows.values()))))
        for name, row in rows.items():
            table.add_row(name, *(f"{value:,.0f}" for value in row.values()))
        Console().print(table)
        return
    trace = make_trace(Shape(), args.sessions, args.seed)
    shape = summary(trace)
    chosen = [name for name in SETTINGS if name in args.settings]
    rows = played(partial(play, num_sessions=args.sessions, seed=args.seed), chosen, args.workers)
    print(", ".join(f"{key} {value:.4g}" for key, value in shape.items()))
    show(rows)
    result = {"trace": shape, "model": asdict(Machine()), "step_tokens": STEP, "rows": rows}
    plot(rows, write_json("agents", result).with_suffix(".png"))


def played(play_one: Callable[[str], dict[str, Any]], names: list[str], workers: int) -> dict[str, dict[str, Any]]:
    """Name -> what was played under it, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        return dict(zip(names, track(pool.imap(play_one, names), "settings", len(names)), strict=True))


if __name__ == "__main__":
    main()
