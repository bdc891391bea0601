"""The tables and the figure of `benchmarks.attamba.quality`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table, saved_figure


def percent(ratio: float) -> str:
    return f"{100 * ratio - 100:+.2f}"


def interval(bounds: Sequence[float] | None, show: Callable[[float], str]) -> str:
    return f"{show(bounds[0])} to {show(bounds[1])}" if bounds else "one seed"


def model_cells(name: str, row: dict[str, Any], by_seed: dict[str, Any]) -> list[str]:
    """Return the first cells of a model's row: its name, learning rate, cache, and how many seeds are in."""
    cache = [f"{row['kv_bytes_per_token']:,.0f}", f"{row['kv_bytes_per_sequence']:,}"]
    return [name, row["learning_rate"], *cache, str(len(by_seed))]


MODEL_HEAD = ("model", "learning rate", "KV bytes a token", "and a sequence", "seeds")


def recall_tables(result: dict[str, Any]) -> list[str]:
    """Return tables of the accuracy by distance with its range over seeds, and of models' differences.

    The differences have intervals over seeds.
    """
    rows, distances = result["models"], list(next(iter(result["models"].values()))["accuracy"])
    accuracies = [
        [
            *model_cells(name, row, row["train_seconds"]),
            *(f"{of['mean']:.2f} ({min(seeds):.2f} to {max(seeds):.2f})" for of, seeds in with_seeds(row["accuracy"])),
        ]
        for name, row in rows.items()
    ]
    differences = [
        [pair, *(f"{of['mean']:+.2f} ({interval(of['over_seeds'], '{:+.2f}'.format)})" for of in by_distance.values())]
        for pair, by_distance in result["differences"].items()
    ]
    columns = [f"D = {distance}" for distance in distances]
    return [markdown_table([*MODEL_HEAD, *columns], accuracies), markdown_table(["difference", *columns], differences)]


def with_seeds(by_distance: dict[str, Any]) -> Iterable[tuple[dict[str, Any], list[float]]]:
    return ((of, list(of["by_seed"].values())) for of in by_distance.values())


def text_tables(result: dict[str, Any]) -> list[str]:
    """Return tables of bits per byte by position, ratios of models with intervals, and the gain from context."""
    rows = result["models"]
    first = next(iter(rows.values()))
    bits = [
        [
            *model_cells(name, row, row["train_seconds"]),
            *(f"{of['mean']:.3f}" for of in row["bits_per_byte"].values()),
        ]
        for name, row in rows.items()
    ]
    ratios = [
        [pair, span, percent(of["mean"]), interval(of["over_windows"], percent), interval(of["over_seeds"], percent)]
        for pair, by_span in result["bits_ratio"].items()
        for span, of in by_span.items()
    ]
    context = [
        [name, *(f"{percent(mean)} ({interval(bounds, percent)})" for mean, *bounds in row["context"].values())]
        for name, row in rows.items()
    ]
    return [
        markdown_table([*MODEL_HEAD, *first["bits_per_byte"]], bits),
        markdown_table(["bits, % over", "positions", "mean", "95 % over windows", "95 % over seeds"], ratios),
        markdown_table(["model", *(f"context {pair}, %" for pair in first["context"])], context),
    ]


def tables(result: dict[str, Any]) -> str:
    """Return all tables of a result."""
    parts = recall_tables(result["recall"]) if "recall" in result else []
    return "\n\n".join([*parts, *(text_tables(result["text"]) if "text" in result else [])])


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot accuracy over the distance of the recall, and bits per byte over positions; lines are means over seeds."""
    panels = [
        ("recall", "accuracy", "distance of the recall, tokens", "accuracy, mean and range of the seeds"),
        ("text", "bits_per_byte", "positions in the sequence", "validation bits per byte"),
    ]
    panels = [panel for panel in panels if panel[0] in result]
    with saved_figure(path, 1, len(panels), figsize=(6.5 * len(panels), 4), squeeze=False) as (_, axes):
        for axis, (task, measure, x, y) in zip(axes[0], panels, strict=True):
            for index, (name, row) in enumerate(result[task]["models"].items()):
                means = [of["mean"] for of in row[measure].values()]
                ranges = [
                    [abs(end(seeds) - of["mean"]) for of, seeds in with_seeds(row[measure])] for end in (min, max)
                ]
                marker = "o" if name.startswith("attamba") else "s"
                axis.errorbar(
                    list(row[measure]), means, ranges, capsize=2, color=f"C{index}", marker=marker, label=name
                )
            axis.set_xlabel(x)
            axis.set_ylabel(y)
            axis.legend(fontsize=8)
