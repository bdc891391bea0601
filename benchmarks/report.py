"""The results of the benchmarks: JSON with the machine and the date, plots, and statistics over interleaved runs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from starling.lab.machine import cpu_facts
from starling.lab.statistics import ratio_interval
from starling.vllm_compat.versions import vllm_version

RESULTS = Path(__file__).resolve().parent / "results"
"""The committed results, whose figures README.md and docs/ state."""

OUT = Path(os.environ.get("BENCHMARKS_OUT", RESULTS))
"""The folder to write to."""

ORIGIN = ("machine", "date", "note")
"""The fields of a stored result that say where its figures come from."""


def machine() -> dict[str, Any]:
    """Return the processor, its family and model number, its cores, and the versions of Python, vLLM and torch."""
    found = cpu_facts()
    return {
        "processor": found.get("model name", "unknown"),
        "family_model": [found.get("cpu family"), found.get("model")],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "vllm": vllm_version(),
        "torch": importlib.metadata.version("torch"),
    }


def origin() -> dict[str, Any]:
    """Return the machine, the date (UTC), and the text of BENCHMARKS_NOTE where that is set."""
    found = {"machine": machine(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    note = os.environ.get("BENCHMARKS_NOTE")
    return found | ({"note": note} if note else {})


def ratios_over(times: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, float]]:
    """Return configuration -> ratio_interval over that of ``ours``, for all others; times are of interleaved runs."""
    names = ("median", "low", "high")
    return {
        name: dict(zip(names, ratio_interval(times[ours], values), strict=True))
        for name, values in times.items()
        if name != ours
    }


def plot_medians(axis: Any, times: Mapping[str, Sequence[float]], digits: str) -> None:
    """Draw a bar with the median seconds of each configuration, the first one on top.

    Args:
        digits: the format of a number.
    """
    medians = [statistics.median(values) for values in times.values()]
    bars = axis.barh(list(times), medians)
    axis.bar_label(bars, [f"{median:{digits}} s" for median in medians], padding=3)
    axis.margins(x=0.15)
    axis.invert_yaxis()


def report_medians(
    name: str,
    title: str,
    seconds: Mapping[str, Mapping[str, Sequence[float]]],
    ours: Mapping[str, str],
    titles: Mapping[str, str],
    *,
    digits: str,
    figsize: tuple[float, float],
    **others: Any,
) -> None:
    """Print, write and draw the median seconds of each configuration of several measurements, and ratios over ours.

    Args:
        name: name of the result.
        seconds: measurement -> configuration -> seconds of interleaved runs.
        ours: measurement -> the configuration that the others are divided by.
        titles: measurement -> its title.
        digits: the format of a number.
        others: other fields of the result.
    """
    table = numbers_table(title, ("measurement", "configuration", "s (median)", "over ours"))
    ratios = {measurement: ratios_over(times, ours[measurement]) for measurement, times in seconds.items()}
    for measurement, times in seconds.items():
        for configuration, values in times.items():
            over = ratios[measurement].get(configuration)
            ratio = f"{over['median']:.2f}x" if over else ""
            table.add_row(titles[measurement], configuration, f"{statistics.median(values):{digits}}", ratio)
    Console().print(table)
    path = write_json(name, {"title": title, **others, "seconds": seconds, "over_ours": ratios})
    with saved_figure(path.with_suffix(".png"), len(seconds), figsize=figsize) as (figure, axes):
        for axis, (measurement, times) in zip(axes, seconds.items(), strict=True):
            plot_medians(axis, times, digits)
            axis.set_title(titles[measurement], fontsize=9)
        figure.suptitle(title, fontsize=10)
    print(path)


def plot_ratios(axis: Any, ratios: Mapping[str, tuple[float, float, float]]) -> None:
    """Draw (median, lower, upper) of each ratio, the first one on top, and a line at 1."""
    for row, (median, lower, upper) in enumerate(ratios.values()):
        axis.errorbar(median, row, xerr=[[median - lower], [upper - median]], fmt="o", capsize=4, color="C0")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
    axis.invert_yaxis()


def numbers_table(title: str, columns: Iterable[str]) -> Table:
    """Return a table of numbers for the terminal."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read_json(name: str) -> dict[str, Any]:
    """Return a stored result without its origin; empty if there is none."""
    return _stored(name)[0]


def _stored(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a stored result without its origin, and its origin; both empty if there is none."""
    path = OUT / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    before = {field: result.pop(field) for field in ORIGIN if field in result}
    return result, before


def write_json(name: str, result: dict[str, Any]) -> Path:
    """Write a result and its origin to OUT; returns the path."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(origin() | result, indent=1) + "\n")
    return path


def write_row(
    name: str, field: str, row: dict[str, Any], key: Sequence[str], **others: Any
) -> tuple[list[dict[str, Any]], Path]:
    """Write one row of a stored result, with its origin. It replaces the row with the same key.

    The origin of the result is that of its last row. A row that was there before keeps its own.

    Args:
        name: name of the result.
        field: the field of the result that holds the rows.
        key: names of the row's values that identify it. The rows are sorted by these values.
        others: other fields of the result to set.

    Returns:
        All rows, and the path of the JSON file.
    """
    (before, its_origin), key_of = _stored(name), itemgetter(*key)
    kept = [its_origin | other for other in before.get(field, []) if key_of(other) != key_of(row)]
    rows = sorted([origin() | row, *kept], key=key_of)
    return rows, write_json(name, before | others | {field: rows})


@contextmanager
def saved_figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (figure, axes) of ``pyplot.subplots``; at the end of the block, write the figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **options)
    yield figure, axes
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_two_times(axis: Any, values: Mapping[str, tuple[float, float]], title: str) -> None:
    """Draw two times for each configuration as bars over one another, the first configuration on top.

    Args:
        values: configuration -> (a usual time, a late one), in seconds.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    labels = list(values)[::-1]
    axis.barh(labels, [values[label][1] for label in labels], color="#d3d3d3")
    axis.barh(labels, [values[label][0] for label in labels], color="#1f77b4")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)


def legend_below(axis: Any, usual: str, late: str) -> None:
    """Say below the axes, where it covers nothing, what the bars of ``plot_two_times`` are."""
    from matplotlib.patches import Patch

    handles = [Patch(color="#1f77b4", label=usual), Patch(color="#d3d3d3", label=late)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.3)}
    axis.legend(handles=handles, ncols=2, frameon=False, fontsize=8, **place)
