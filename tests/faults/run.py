"""`python -m tests.faults.run [WORD...]`: runs the cells whose names match all words, and keeps their results.

Results are kept in results.json beside this file, and replace older ones of the same cells. Needs root.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.random_llama import make_tiny_llama
from examples.server import end_on_signals
from tests.faults.hosts import on_two_hosts
from tests.faults.page import write
from tests.faults.place import place
from tests.faults.run_cell import Result, look_at_failed_start, run_cell
from tests.faults.served import Served, served
from tests.faults.table import HOSTS, IDLE, SERVERS, START, Cell, cells

FOLDER = Path(__file__).resolve().parents[2] / "build" / "faults"
"""Has the model and the logs. It is a part of the checkout, which the servers see wherever it lies (place.py)."""
RESULTS = Path(__file__).with_name("results.json")


class Servers:
    """One server at a time, which serves cell after cell until one ends it or shows a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.stack, self.running = ExitStack(), None

    def get(self, name: str) -> Served:
        if self.running is None:
            self.number += 1
            log = self.folder / f"{self.number:02}-{name.replace(' ', '-')}.log"
            model = make_tiny_llama(self.folder / "tiny")
            with ExitStack() as stack:
                if name in HOSTS:
                    self.running = stack.enter_context(on_two_hosts(model, *HOSTS[name], folder=self.folder))
                else:
                    here = stack.enter_context(place())
                    self.running = stack.enter_context(served(here, model, *SERVERS[name], log=log))
                self.stack = stack.pop_all()
        return self.running

    def stop(self) -> None:
        self.stack.close()
        self.stack, self.running = ExitStack(), None


def run(chosen: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, Result]]:
    """The result of each cell, in order."""
    servers = Servers(folder)
    try:
        for name, group in groupby(chosen, key=lambda cell: cell.server):
            servers.stop()
            for cell in group:
                yield cell, result_of(servers, name, cell)
    finally:
        servers.stop()


def result_of(servers: Servers, name: str, cell: Cell) -> Result:
    """The result of a cell. A server that has ended, lacks a process, or has shown a fault, serves no other cell."""
    try:
        result = run_start(servers, cell) if cell.moment == START else run_cell(servers.get(name), cell)
    except Exception as error:
        traceback.print_exc()
        result = Result(faults=[f"not run: {error!r}"])
    if result.faults or cell.fault == "SIGKILL" or servers.running is None or servers.running.has_ended:
        servers.stop()
    return result


def run_start(servers: Servers, cell: Cell) -> Result:
    """The result of a cell whose fault begins before the server does."""
    servers.stop()
    log = servers.folder / f"start-{cell.target.replace('/', '-')}.log"
    model = make_tiny_llama(servers.folder / "tiny")
    with place() as here, ExitStack() as stack:
        here.fill(cell.target)
        try:
            running = stack.enter_context(served(here, model, *SERVERS[cell.server], log=log))
        except RuntimeError as error:
            return look_at_failed_start(cell, here, error)
        return run_cell(running, replace(cell, fault="none", moment=IDLE))


def read() -> dict[str, Any]:
    """The results so far, by the names of the cells."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the fault matrix and write docs/faults.md.")
    parser.add_argument("words", nargs="*", help="regular expressions: run the cells whose names match all of them")
    parser.add_argument("--failed", action="store_true", help="run the cells that showed a fault, or have no result")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    arguments = parser.parse_args()
    results = read()
    chosen = [cell for cell in cells() if all(re.search(word, cell.name) for word in arguments.words)]
    if arguments.failed:
        chosen = [cell for cell in chosen if results.get(cell.name, {"faults": True})["faults"]]
    if arguments.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    end_on_signals()
    FOLDER.mkdir(parents=True, exist_ok=True)
    shown = 0
    for number, (cell, result) in enumerate(run(chosen, FOLDER), 1):
        shown += bool(result.faults)
        print(f"{number}/{len(chosen)} {cell.name}: {'; '.join(result.faults) or 'as expected'}", flush=True)
        results = read() | {cell.name: asdict(result)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(read())
    return 1 if shown else 0


if __name__ == "__main__":
    sys.exit(main())
