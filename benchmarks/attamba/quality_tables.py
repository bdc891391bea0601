"""The tables and the figure of `benchmarks.attamba.quality`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import saved_figure


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def percent(ratio: float) -> str:
    return f"{100 * ratio - 100:+.2f}"


def interval(bounds: Sequence[float] | None, show: Callable[[float], str]) -> str:
    return f"{show(bounds[0])} to {show(bounds[1])}" if bounds else "one seed"


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md: models, comparisons, gain from context, recall."""
    rows = result["models"]
    first = next(iter(rows.values()))
    models = table(
        [
            "model",
            "learning rate",
            "KV bytes a token",
            "and a sequence",
            "bits per byte, by seed",
            *first["by_position"],
        ],
        [
            [
                name,
                f"{row['learning_rate']:g}",
                f"{row['kv_bytes_per_token']:,.0f}",
                f"{row['kv_bytes_per_sequence']:,}",
                ", ".join(f"{bits:.4f}" for bits in row["bits_per_byte"].values()),
                *(f"{bits:.3f}" for bits in row["by_position"].values()),
            ]
            for name, row in rows.items()
        ],
    )
    ratios = table(
        ["bits, % over", "positions", "mean", "95 % over windows", "95 % over seeds"],
        [
            [
                pair,
                span,
                percent(of["mean"]),
                interval(of["over_windows"], percent),
                interval(of["over_seeds"], percent),
            ]
            for pair, by_span in result["bits_ratio"].items()
            for span, of in by_span.items()
        ],
    )
    context = table(
        ["model", *(f"context {pair}, %" for pair in first["context"])],
        [
            [name, *(f"{percent(mean)} ({interval(of, percent)})" for mean, *of in row["context"].values())]
            for name, row in rows.items()
        ],
    )
    recall = table(
        ["model", *(f"recall at {distance}" for distance in first["recall"])],
        [
            [
                name,
                *(
                    f"{of['mean']:.2f} ({interval(of['over_seeds'], lambda bound: f'{min(1, max(0, bound)):.2f}')})"
                    for of in row["recall"].values()
                ),
            ]
            for name, row in rows.items()
        ],
    )
    return "\n".join([models, ratios, context, recall])


def plot(result: dict[str, Any], baseline: str, path: Path) -> None:
    """Plot bits per byte over the size of the cache, bits relative to the transformer's over positions, and recall."""
    with saved_figure(path, 1, 3, figsize=(13, 3.8)) as (_, (left, middle, right)):
        for index, (name, row) in enumerate(result["models"].items()):
            style = {"color": f"C{index}", "marker": "o" if name.startswith("attamba") else "s", "label": name}
            bits = list(row["bits_per_byte"].values())
            left.plot([row["kv_bytes_of_training_length"]] * len(bits), bits, linestyle="", **style)
            by_span = result["bits_ratio"].get(f"{name} over {baseline}", {})
            if by_span:
                means = [of["mean"] for of in by_span.values()]
                errors = [[abs(of["mean"] - of["over_windows"][side]) for of in by_span.values()] for side in (0, 1)]
                middle.errorbar(list(by_span), means, errors, capsize=2, **style)
            right.plot(list(map(str, row["recall"])), [of["mean"] for of in row["recall"].values()], **style)
        left.set_xscale("log", base=2)
        left.set_xlabel("KV cache of a sequence of the training length, bytes (bf16)")
        left.set_ylabel("validation bits per byte, one mark per seed")
        left.legend(fontsize=8)
        middle.axhline(1, color="grey", linewidth=0.8)
        middle.tick_params(axis="x", labelsize=7)
        middle.set_xlabel("positions in the sequence")
        middle.set_ylabel(f"bits over those of the {baseline}")
        right.set_xlabel("distance of the recall, tokens")
        right.set_ylabel("accuracy, mean over seeds")
