"""docs/faults.md, made from the results of the last run of each cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.faults.table import NOTES, SERVER_NOTES, Cell, Expected, cells

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"

HEAD = """# Faults

What clients see if a process, a link, a disk or a clock fails, and what is left behind. `make faults` runs each row
against real servers on CPU, and writes this page (`tests/faults/`; needs root). CI runs three of the rows.

{summary}

## How it is measured

Four clients send one request each: HTTP and gRPC, streamed and not. The moments are made to occur. `idle`: the requests
are sent right after the fault begins. `prefill`: the prompts are being computed. `transfer`: a replica begins to read
another one's KV pages. `decode`: all four outputs are being generated, and the streams are open.

A request may end in these ways:

- `answer`: the whole output, and each of its tokens is the model's. The server computes each output again afterwards to
  check this.
- `error`: a status, or an error event in a stream. A gRPC client whose connection ends gets UNAVAILABLE from its own
  library.
- `aborted`: some of the output, with `abort` as its finish reason. vLLM ends requests so when a server shuts down, or
  another replica has ended. An HTTP stream that has no token yet then ends without a finish reason.
- `closed`: the connection ended, or was refused, without a status.
- `silence`: no end within the deadline. `short`: an output without an error that is not whole. `wrong`: other tokens
  than the model's. None of these three is ever expected.

A server that survives then has to hold no page and no request. Of one that ends, no process, no open port and no file
in /tmp or /dev/shm may be left; empty files, such as sockets that nothing listens on, do not count. Each server has a
/tmp and a /dev/shm of its own (a mount namespace), so that all of its files are found.

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
    notes = "\n".join(f"- **{name}**: {note}" for name, note in NOTES.items())
    parts = [HEAD.format(notes=notes, summary=summary(len(every), ran, results))]
    for server, group in groupby(every, key=lambda cell: cell.server):
        parts.append(f"\n## {server.capitalize()}\n\n{SERVER_NOTES[server]}\n\n")
        of_server = list(group)
        shown = [cell for cell in of_server if cell.name in results]
        if shown:
            parts.append(table(row(cell, results[cell.name]) for cell in shown))
        if missing := Counter(cell.fault for cell in of_server if cell.name not in results):
            counted = ", ".join(f"{fault} ({number})" for fault, number in missing.items())
            parts.append("\n" * bool(shown) + f"Cells without a result: {counted}.\n")
    return "".join(parts)


def summary(number: int, ran: Iterable[Cell], results: Mapping[str, Any]) -> str:
    """How many cells there are, were run, and were as expected; and a table of those that were not."""
    faults = {cell: results[cell.name]["faults"] for cell in ran}
    different = [
        (cell.server, cell.fault, cell.target, cell.moment, differences(found))
        for cell, found in faults.items()
        if found
    ]
    text = f"Of {number} cells {len(faults)} were run. In {len(faults) - len(different)} of them all was as expected."
    if not different:
        return text
    rows = table(different, ("server", "fault", "of", "moment", "what differs"))
    return f"{text}\nThe others; the tables below have the whole of each row:\n\n{rows}".rstrip()


HEADINGS = ("fault", "of", "moment", "expected", "requests", "seconds", "/health", "gRPC health", "result")


def table(rows: Iterable[Iterable[str]], headings: Sequence[str] = HEADINGS) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row(cell: Cell, result: Mapping[str, Any]) -> list[str]:
    health = (" → ".join(result[name]) for name in ("http_health", "grpc_health"))
    verdict = f"**differs**: {differences(result['faults'])}" if result["faults"] else "as expected"
    shown = [ends(result["ends"]), str(result["seconds"]), *health]
    return [cell.fault, cell.target, cell.moment, expectation(cell.expected), *shown, verdict]


def differences(faults: Iterable[str]) -> str:
    return "; ".join(cut(fault) for fault in faults)


def expectation(expected: Expected) -> str:
    """In words, for example `error within 20 s, exit code 1`."""
    server = "serves on" if expected.exit is None else f"exit code {expected.exit}"
    return f"{' or '.join(expected.ends)} within {expected.seconds:g} s, {server}"


def ends(of_clients: Mapping[str, str]) -> str:
    """How the requests ended; clients with the same end together."""
    by_end: dict[str, list[str]] = {}
    for client, end in of_clients.items():
        by_end.setdefault(end, []).append(client)
    if len(by_end) == 1:
        return f"{next(iter(by_end))}, all four"
    return "; ".join(f"{end}: {', '.join(clients)}" for end, clients in by_end.items())


def cut(text: str) -> str:
    """A text for a cell of a table."""
    one_line = " ".join(text.replace("|", "\\|").split())
    return one_line if len(one_line) < 160 else one_line[:160] + " ..."
