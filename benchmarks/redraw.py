"""Draws pictures again from the stored results, without measuring: `python -m benchmarks.redraw`.

For pictures whose drawing has changed. Each is drawn by the benchmark that made it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import default_plan, fairness, routing
from benchmarks.agents import __main__ as agents_main
from benchmarks.report import OUT, RESULTS
from starling.lab.evaluation.comparison import Cell
from starling.lab.evaluation.report import figure_png


def draw_cells(result: dict[str, Any], path: Path) -> None:
    """The picture of an evaluation (benchmarks/accuracy.py)."""
    drawn = figure_png([Cell.model_validate(cell) for cell in result["cells"]])
    assert drawn is not None
    path.write_bytes(drawn)


DRAWN: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "agents": lambda result, path: agents_main.plot(result["rows"], path),
    "agents_live": lambda result, path: agents_main.plot(result["rows"], path),
    "fairness": lambda result, path: fairness.plot(result["results"], path),
    "routing": lambda result, path: routing.plot(result["routing"], path),
    "default_plan_*": lambda result, path: default_plan.plot(result["rows"], path),
    "accuracy_*": draw_cells,
}
"""Names of results, as patterns -> what draws their picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"results, as patterns; default: {', '.join(DRAWN)}")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in DRAWN]:
        parser.error(f"NAME {', '.join(unknown)}: no such picture. Allowed: {', '.join(DRAWN)}.")
    for name in args.names or DRAWN:
        for stored in sorted(RESULTS.glob(f"{name}.json")):
            DRAWN[name](json.loads(stored.read_text()), OUT / f"{stored.stem}.png")
            print(OUT / f"{stored.stem}.png")


if __name__ == "__main__":
    main()
