"""The figure of an evaluation: how far the plans are from dense. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from starling.lab.evaluation.comparison import Cell
from starling.lab.statistics import Interval


@dataclass(frozen=True)
class Panel:
    """What one part of the figure shows.

    Attributes:
        label: of the horizontal axis.
        equal: where a plan that equals dense would be.
        values: of the cells; an interval without width has no bar.
    """

    title: str
    label: str
    equal: float
    values: list[tuple[Cell, Interval]]


def make_panels(cells: Sequence[Cell]) -> list[Panel]:
    """Differences of scores; and for prompts without references the KL, or the share of equal answers without it."""
    scored: list[tuple[Cell, Interval]] = []
    equal: list[tuple[Cell, Interval]] = []
    apart: list[tuple[Cell, Interval]] = []
    for cell in cells:
        if cell.difference is None:
            continue
        if cell.against_reference:
            scored.append((cell, scaled(cell.difference, 100, 0)))
        elif cell.kl is not None:
            apart.append((cell, Interval(mean=cell.kl, low=cell.kl, high=cell.kl)))
        else:  # dense's score is 1
            equal.append((cell, scaled(cell.difference, 100, 100)))
    panels = [
        Panel(
            "Scores with star blocks, beside dense attention", "points above or below dense; 95 % intervals", 0, scored
        ),
        Panel("Answers that are dense attention's", "same answer as dense, %; 95 % intervals", 100, equal),
        Panel("How far probabilities are from dense attention's", "KL, nats for each token; 0: equal", 0, apart),
    ]
    return [panel for panel in panels if panel.values]


def scaled(interval: Interval, factor: float, offset: float) -> Interval:
    return Interval(**{name: offset + factor * value for name, value in interval})


def figure_png(cells: Sequence[Cell]) -> bytes | None:
    """The figure as PNG; None without matplotlib, or without a star plan."""
    panels = make_panels(cells)
    if not panels or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    heights = [1.5 + 0.22 * len(panel.values) + 0.22 * len(rows_of(panel)) for panel in panels]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for panel, axes in zip(panels, parts[:, 0], strict=True):
        draw(panel, axes)
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=110)
    return output.getvalue()


def rows_of(panel: Panel) -> list[tuple[str, int | None]]:
    """The tasks and lengths of a panel."""
    return list(dict.fromkeys((cell.task, cell.length) for cell, _ in panel.values))


def draw(panel: Panel, axes: Any) -> None:
    """Draw a panel into matplotlib's axes."""
    rows = rows_of(panel)
    plans = list(dict.fromkeys(cell.plan for cell, _ in panel.values))
    for number, plan in enumerate(plans):
        found = [(rows.index((cell.task, cell.length)), value) for cell, value in panel.values if cell.plan == plan]
        heights = [row + 0.8 * (number + 0.5) / len(plans) - 0.4 for row, _ in found]
        means = [value.mean for _, value in found]
        bars = [[value.mean - value.low for _, value in found], [value.high - value.mean for _, value in found]]
        has_bars = any(value.low < value.high for _, value in found)
        axes.errorbar(means, heights, xerr=bars if has_bars else None, fmt="o", capsize=3, label=in_words(plan))
    axes.axvline(panel.equal, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{task} {length:,}" if length else task for task, length in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / len(rows) - 0.05), frameon=False)


WORDS = {"B": "blocks of", "A": "anchor", "O": "overlap", "H": "dense heads", "Q": "query", "S": "documents at"}
"""Parts of a plan's name (lab/evaluation/plans.py), in words."""


def in_words(plan: str) -> str:
    """The name of a plan as a legend shows it: "blocks of 512, anchor 64, overlap 448"."""
    parts = []
    for part in plan.split(","):
        name, equals, value = part.partition("=")
        if name.startswith("n/"):
            parts.append(f"blocks of 1/{name.removeprefix('n/')} of the prompt")
        elif name == "B" and value.startswith("n/"):
            parts.append(f"blocks of 1/{value.removeprefix('n/')} of the prompt")
        elif equals and name in WORDS and part != "O=0":
            parts.append(f"{WORDS[name]} {value}")
        elif part == "O=0":
            parts.append("no overlap")
        else:
            parts.append(part)
    return ", ".join(parts)
