"""Host time of a step of decodes behind documents: `python -m benchmarks.host_step`. Needs no model and no GPU.

The worker makes the virtual rows of each step, and the positions of its tokens, before a model's layers run: for so
many rows of as many documents each. Writes results/host_step.json and .png. Takes 10 seconds.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import saved_figure, write_json
from starling.attention_backends.star.document_step import DocumentStep
from starling.attention_backends.star.step import StarStep
from starling.scheduler.planning.plan import StarPlan

PAGE = 16
LENGTH = 60  # tokens of a document, which end on no page


def plan_of(documents: int, row: int) -> StarPlan:
    """Return a head of two pages and documents of four pages; each row has its own plan."""
    starts = [0, *(PAGE * (2 + 4 * number) for number in range(documents))]
    borders = ((0, 2 * PAGE), *((start, start + LENGTH - row % 8) for start in starts[1:]))
    end = starts[-1] + 4 * PAGE
    return StarPlan(4 * PAGE, 2 * PAGE, 0, end, end + 40, documents=borders)


def measure(rows: int, documents: int, rounds: int) -> list[float]:
    """Return the milliseconds of each of ``rounds`` steps: one token a row."""
    names = [str(number) for number in range(rows)]
    plans = {name: plan_of(documents, int(name)) for name in names}
    times = []
    for number in range(rounds):
        step = StarStep(plans, dict.fromkeys(names, 1), lambda: names, lambda rows: None, DocumentStep())
        ends = torch.tensor([plan.num_prompt_tokens + 1 + number for plan in plans.values()])
        common: Any = SimpleNamespace(query_start_loc_cpu=torch.arange(rows + 1), seq_lens_cpu_upper_bound=ends)
        began = time.perf_counter()
        found = step.rows(common, PAGE)
        times.append(1000 * (time.perf_counter() - began))
        assert found is not None and found.rerotated is not None and len(found.rerotated.row) == rows * (documents + 1)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="decodes of a step (%(default)s)")
    parser.add_argument("--documents", type=int, nargs="+", default=[16, 128], help="of a prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="steps (%(default)s)")
    args = parser.parse_args()
    found = []
    table = Table("rows", "documents of each", "milliseconds, median of the steps")
    for documents in args.documents:
        for rows in args.rows:
            times = measure(rows, documents, args.rounds)
            found.append({"rows": rows, "documents": documents, "milliseconds": median(times)})
            table.add_row(str(rows), str(documents), f"{median(times):.3f}")
    Console().print(table)
    path = write_json("host_step", {"rounds": args.rounds, "steps": found})
    with saved_figure(path.with_suffix(".png"), figsize=(5, 3)) as (_, axis):
        for documents in args.documents:
            of = [one for one in found if one["documents"] == documents]
            label = f"{documents} documents a row"
            axis.plot([one["rows"] for one in of], [one["milliseconds"] for one in of], "o-", label=label)
        axis.set(xlabel="rows of a step", ylabel="milliseconds", xscale="log", ylim=(0, None))
        axis.legend()
    print(path)


if __name__ == "__main__":
    main()
