"""The figure of an evaluation: differences to dense with their intervals. Needs matplotlib (the extra `bench`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec

from engine_ext.evaluation.statistics import Cell


def figure_png(cells: Sequence[Cell]) -> bytes | None:
    """The figure as PNG; None without matplotlib, or without a difference of scores."""
    shown = [cell for cell in cells if cell.difference is not None and cell.against_reference]
    if not shown or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((cell.task, cell.length) for cell in shown))
    plans = list(dict.fromkeys(cell.plan for cell in shown))
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(rows) * (len(plans) + 1)), layout="constrained")
    axes = figure.add_subplot()
    for number, plan in enumerate(plans):
        of_plan = [(rows.index((cell.task, cell.length)), cell.difference) for cell in shown if cell.plan == plan]
        found = [(row, difference) for row, difference in of_plan if difference is not None]
        heights = [row + 0.8 * (number + 0.5) / len(plans) - 0.4 for row, _ in found]
        means = [100 * difference.mean for _, difference in found]
        below = [100 * (difference.mean - difference.low) for _, difference in found]
        above = [100 * (difference.high - difference.mean) for _, difference in found]
        axes.errorbar(means, heights, xerr=[below, above], fmt="o", capsize=3, label=plan)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{task} {length:,}" if length else task for task, length in rows])
    axes.invert_yaxis()
    axes.set_xlabel("difference to dense, points, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best")
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=110)
    return output.getvalue()
