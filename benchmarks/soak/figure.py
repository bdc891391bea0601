"""The curves of the soak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import saved_figure
from benchmarks.soak.series import LONGEST_STALL
from benchmarks.soak.target import STARLING

PANELS = {
    "RSS": "memory (RSS), MiB since the warm-up",
    "descriptors": "descriptors, sockets among them",
    "threads": "threads",
}
ENGINES, STALLED = ("pages used", "pages cached", "requests running"), (LONGEST_STALL,)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a column for each run.

    It has memory, descriptors and threads of each process, and pages and requests of the engines. A last panel has the
    stalls of the event loops, if the servers of a run have a watchdog for them.
    """
    rows = [*PANELS, "engines", *(["stalls"] if any(curves(run, STALLED) for run in runs) else [])]
    size = (6.5 * len(runs), 3.25 * len(rows))
    with saved_figure(path, len(rows), len(runs), figsize=size, squeeze=False) as (_, axes):
        for column, run in zip(axes.T, runs, strict=True):
            sent = f"{run['requests']['sent']:,} requests, {run['requests']['lost']} lost"
            title = f"{servers_of(run)}, {run['rate_requests_per_second']:.1f} requests/s:\n{sent}"
            column[0].set_title(title, fontsize=10)
            for panel, (quantity, label) in zip(column, PANELS.items(), strict=False):
                for name, curve in curves(run, [quantity]).items():
                    base = curve[0] if quantity == "RSS" else 0
                    plot(panel, run, [value - base for value in curve], name.removesuffix(f": {quantity}"))
                panel.set_ylabel(label, fontsize=8)
            for panel, names, label in zip(
                column[len(PANELS) :], (ENGINES, STALLED), ("all engines", "longest stall, ms"), strict=False
            ):
                for name, curve in curves(run, names).items():
                    plot(panel, run, curve, name)
                panel.set_ylabel(label, fontsize=8)
            column[-1].set_xlabel("minutes after the warm-up")
            for panel in column:
                panel.grid(alpha=0.3)
                if panel.lines:
                    panel.legend(fontsize=5, ncols=2)


def servers_of(run: dict[str, Any]) -> str:
    """Return the servers of a run, in words."""
    engines = "one engine" if run["replicas"] == 1 else f"{run['replicas']} replicas"
    return engines if run["front"] == STARLING else f"{run['front']}, {engines}"


def curves(run: dict[str, Any], quantities: Sequence[str]) -> dict[str, list[float]]:
    """Return the curves of some quantities by the names of their series, which end with the quantity."""
    series = run["series"].items()
    return {name: each["curve"] for name, each in series if name.rpartition(": ")[2] in quantities}


def plot(panel: Any, run: dict[str, Any], values: Sequence[float], label: str) -> None:
    """Plot a curve of medians at equal distances over the run."""
    step = run["minutes"] / len(values)
    panel.plot([step * (index + 0.5) for index in range(len(values))], values, label=label, linewidth=1)
