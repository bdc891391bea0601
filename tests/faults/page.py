"""docs/faults.md: what clients saw at worst, from the results of the last run of each cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.faults.clients import ABORTED, ANSWER, CLOSED, ERROR, SHORT, SILENCE, WRONG
from tests.faults.table import NOTES, Cell, cells

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
BADNESS = (ANSWER, ABORTED, ERROR, CLOSED, SHORT, SILENCE, WRONG)
"""The ends of a request, from the best to the worst."""
ROLES = dict.fromkeys(("engine", "worker", "replica 0", "replica 1", "replica 1 worker"), "engine or worker") | {
    "clock, one day ahead": "clock",
    "clock, one day back": "clock",
}
"""Targets that are one in the page. All others stand for themselves."""
COLUMNS = ("start", "idle", "prefill", "transfer", "decode")

HEAD = """# Faults

What clients see at worst if a process, a link, a disk or a clock fails. `make faults` runs each fault at each moment of
a request against real servers on CPU: one engine with two workers, two replicas, and replicas on two hosts (network
namespaces; needs root). `shards`: with `star_shards` `on`. Four clients send a request each: HTTP and gRPC, streamed
and not.

{summary}

## What clients see

The columns are what happens when the fault begins. `start`: the server starts after it. `idle`: the requests are sent
right after it. `transfer`: a replica begins to read another one's KV pages. `decode`: the streams are open. Every
request ended within {seconds:.0f} s.

{table}
- `answer`: the whole output, and each of its tokens is the model's.
- `error`: a status, or an error event in a stream. A gRPC client whose connection ends gets UNAVAILABLE.
- `aborted`: some of the output, with `abort` as its finish reason, which an HTTP stream without a token leaves out.
- `closed`: the connection ended, or was refused, without a status.
- Never seen: an output that is not whole, none within the deadline, or other tokens than the model's.

{notes}
"""


def write(results: Mapping[str, Any]) -> None:
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """The page.

    Args:
        results: of run_cell.Result as JSON, by the name of the cell.
    """
    every = list(cells())
    ran = [cell for cell in every if cell.name in results]
    notes = "\n".join(f"- **{name}**: {note}." for name, note in NOTES.items())
    by_row = [(of, list(group)) for of, group in groupby(sorted(ran, key=order), key=row_of)]
    rows: dict[tuple[str, ...], list[str]] = {}
    for (fault, target), of_row in by_row:
        rows.setdefault((fault, *worst_by_moment(of_row, results)), []).append(target)
    return HEAD.format(
        notes=notes,
        seconds=max((results[cell.name]["seconds"] for cell in ran), default=0),
        summary=summary(len(every), ran, results),
        table=table(
            ((fault, ", ".join(targets), *shown) for (fault, *shown), targets in rows.items()),
            ("fault", "of", *COLUMNS),
        ),
    )


def row_of(cell: Cell) -> tuple[str, str]:
    """The fault and the target of a cell's row."""
    return cell.fault, ROLES.get(cell.target, cell.target)


def order(cell: Cell) -> tuple[int, tuple[str, str]]:
    """Of rows: the faults as in the table of cells."""
    faults = list(dict.fromkeys(one.fault for one in cells()))
    return faults.index(cell.fault), row_of(cell)


def worst_by_moment(of_row: Sequence[Cell], results: Mapping[str, Any]) -> list[str]:
    """Of a fault and a target, in the order of COLUMNS."""
    return [worst_at([cell for cell in of_row if cell.moment == moment], results) for moment in COLUMNS]


def worst_at(found: Sequence[Cell], results: Mapping[str, Any]) -> str:
    """The worst end of cells; that of servers with shards apart, where it is another."""
    shards = [cell for cell in found if cell.server.endswith("shards")]
    rest = [cell for cell in found if cell not in shards]
    first, second = (worst([results[cell.name] for cell in group]) for group in (rest, shards))
    if first and second and first != second:
        return f"{first}; shards: {second}"
    return first or second


def worst(found: Iterable[Mapping[str, Any]]) -> str:
    """Of these results; empty: there are none, or none has an end."""
    ends = {end.partition(" ")[0] for result in found for end in result["ends"].values()}
    return max(ends, key=BADNESS.index, default="")


def summary(number: int, ran: Iterable[Cell], results: Mapping[str, Any]) -> str:
    """How many cells there are, were run, and were as expected; and a table of those that were not."""
    faults = {cell: results[cell.name]["faults"] for cell in ran}
    different: dict[tuple[str, ...], list[str]] = {}
    for cell, found in faults.items():
        if found:
            different.setdefault((cell.server, cell.fault, cell.target, differences(found)), []).append(cell.moment)
    as_expected = sum(not found for found in faults.values())
    text = (
        f"Of {number} cells {len(faults)} were run. In {as_expected} of them all was as expected: the clients saw what "
        "they should, a server\nthat survives held no page and no request, and one that ended left no process, port or "
        "file. `tests/faults/results.json` has each."
    )
    if not different:
        return text
    rows = [(*of[:3], ", ".join(moments), of[3]) for of, moments in different.items()]
    return f"{text}\nThe others:\n\n{table(rows, ('server', 'fault', 'of', 'moment', 'what differs'))}".rstrip()


def table(rows: Iterable[Iterable[str]], headings: Sequence[str]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def differences(faults: Iterable[str]) -> str:
    return "; ".join(cut(fault) for fault in faults)


def cut(text: str) -> str:
    """A text for a cell of a table."""
    one_line = " ".join(text.replace("|", "\\|").split())
    return one_line if len(one_line) < 160 else one_line[:160] + " ..."
