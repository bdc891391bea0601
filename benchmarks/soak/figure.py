"""The curves of the soak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import saved_figure
from benchmarks.soak.target import STARLING

PANELS = {
    "RSS": "memory (RSS), MiB since the warm-up",
    "descriptors": "descriptors, sockets among them",
    "threads": "threads",
}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each run: memory, descriptors and threads of each process, pages and requests of the engines."""
    with saved_figure(path, len(PANELS) + 1, len(runs), figsize=(6.5 * len(runs), 13), squeeze=False) as (_, axes):
        for column, run in zip(axes.T, runs, strict=True):
            engines = "one engine" if run["replicas"] == 1 else f"{run['replicas']} replicas"
            engines = engines if run["front"] == STARLING else f"{run['front']}, {engines}"
            sent = f"{run['requests']['sent']:,} requests, {run['requests']['lost']} lost"
            column[0].set_title(f"{engines}, {run['rate_requests_per_second']:.1f} requests/s: {sent}", fontsize=10)
            for panel, (quantity, label) in zip(column, PANELS.items(), strict=False):
                curves = {name: series["curve"] for name, series in run["series"].items()}
                for name, curve in curves.items():
                    process, _, end = name.rpartition(": ")
                    if end == quantity:
                        base = curve[0] if quantity == "RSS" else 0
                        plot(panel, run, [value - base for value in curve], process)
                panel.set_ylabel(label, fontsize=8)
            for name in ("pages used", "pages cached", "requests running"):
                plot(column[-1], run, run["series"][name]["curve"], name)
            column[-1].set_ylabel("all engines", fontsize=8)
            column[-1].set_xlabel("minutes after the warm-up")
            for panel in column:
                panel.grid(alpha=0.3)
                panel.legend(fontsize=5, ncols=2)


def plot(panel: Any, run: dict[str, Any], values: Sequence[float], label: str) -> None:
    """A curve of medians at equal distances over the run."""
    step = run["minutes"] / len(values)
    panel.plot([step * (index + 0.5) for index in range(len(values))], values, label=label, linewidth=1)
