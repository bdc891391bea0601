"""Servers under a mixed load for a long time: `make soak MINUTES=60`.

The program starts `starling serve` with a tiny random Llama, with --peers also servers that are peers of one another,
and measures how many requests of the mix each completes in a second while all of them work. Then it sends requests at
random times, at 80 % of that rate, for a warm-up (a quarter of the minutes, between one minute and five) and for the
minutes themselves. benchmarks/soak/mix.py has the kinds of requests. The capacity is a figure of this run alone: other
work on the machine changes it.

Every 3 seconds it samples each process of the servers. Once a minute it waits until all requests have ended: then no
request may run and no page may be in use. It exits with 1 if a request is lost, an answer differs from the first answer
to its prompt, a page stays in use, an event loop stands still (where the server has a watchdog of it), a process ends,
a file stays behind, or a series grows: the 95 % interval of its slope (benchmarks/soak/trend.py) lies above the bound
of benchmarks/soak/series.py. A series whose interval contains the bound is unclear; a longer run tells more. In less
than 5 minutes, growth has no verdict. To tell the growth of vLLM from Starling's, compare `--front http` with
`--front plain`, which get the same requests. Writes results/soak.json and .png; the servers' logs are in build/.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import OUT, write_row
from benchmarks.soak.figure import draw
from benchmarks.soak.run import soak
from benchmarks.soak.server import soaked_servers
from benchmarks.soak.target import HTTP, PLAIN, STARLING
from benchmarks.soak.verdict import failures
from examples.server import end_on_signals

ROOT = Path(__file__).resolve().parents[2]
NAME = "soak"
LEAST_MINUTES, STOP_SECONDS = 2, 120


def main() -> int:
    args = parse_arguments()
    end_on_signals()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        with soaked_servers(Path(name), ROOT / "build", args.replicas, args.front) as servers:
            before = {
                each.name: set(each.temporary.iterdir()) for each in servers
            }  # vLLM leaves its own sockets behind
            run, samplers = asyncio.run(soak(servers, args.minutes, console))
            # The exit code of the first server that has another one than 0.
            run["exit_code"] = next((code for each in servers if (code := each.server.stop(STOP_SECONDS))), 0)
        run = {"front": args.front, "replicas": args.replicas} | run
        run["files_left"] = sorted(
            path for sampler in samplers.values() for path in sampler.shared if Path(path).exists()
        )
        run["files_left"] += sorted(
            path.name for each in servers for path in set(each.temporary.iterdir()) - before[each.name]
        )
        logs = [each.server.log.read_text(errors="replace") for each in servers]
        run["tracebacks_in_the_log"] = sum(log.count("Traceback (most recent call last)") for log in logs)
    rows, path = write_row(NAME, "runs", run, ["front", "replicas"])
    draw(rows, OUT / f"{NAME}.png")
    console.print(table(run))
    console.print(counts(run), markup=False)
    for line in (found := failures(run)):
        console.print(line, style="red", markup=False)
    console.print(f"{'Failed' if found else 'Passed'}. Wrote {path}.")
    return int(bool(found))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Refuse (exit code 2) a run that is too short, and a server without an engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.soak"
    )
    parser.add_argument("--minutes", type=float, default=30, help="minutes after the warm-up (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="data-parallel replicas (default: %(default)s)")
    fronts = f"{HTTP}: requests over HTTP only, as {PLAIN}, which is vLLM without Starling (default: %(default)s)"
    parser.add_argument("--front", choices=[STARLING, HTTP, PLAIN], default=STARLING, help=fronts)
    args = parser.parse_args()
    if args.minutes < LEAST_MINUTES:
        reason = f"a trend needs {LEAST_MINUTES} minutes of samples"
        parser.error(f"--minutes {args.minutes:g} is refused: {reason}. Allowed: {LEAST_MINUTES} or more.")
    if args.replicas < 1:
        parser.error(f"--replicas {args.replicas} is refused: a server has an engine. Allowed: 1 or more.")
    return args


def counts(run: Mapping[str, Any]) -> str:
    """Return the numbers that a run is about, in one line."""
    found, stalls = run["requests"], [each["longest_ms"] for each in run["event_loops"].values() if each]
    longest = "not measured" if not stalls else f"{max(stalls):g} ms" if max(stalls) else "none above 200 ms"
    still = run["machine_stood_still"]
    return (
        f"{found['sent']} requests, {run['faults']} of them faults; lost: {found['lost']}; pages leaked: "
        f"{run['pages_leaked']:g}; longest stall of an event loop: {longest}; the machine stood still {len(still)} "
        f"times, {sum(still):g} s in all, and {found['lost_while_the_machine_stood_still']} requests were lost by that"
    )


def table(run: dict[str, Any]) -> Table:
    """Return the series that have a bound, the fastest growing ones of each verdict first."""
    shown = Table("series", "first", "last", "per hour", "95 % interval", "bound", "verdict")
    judged = [(name, series) for name, series in run["series"].items() if series["verdict"]]
    for name, series in sorted(judged, key=lambda item: (item[1]["verdict"], -item[1]["per_hour"])):
        lower, upper = series["interval"]
        numbers = (f"{series[key]:g}" for key in ("first", "last", "per_hour"))
        shown.add_row(name, *numbers, f"{lower:g} to {upper:g}", f"{series['bound']:g}", series["verdict"])
    return shown


if __name__ == "__main__":
    sys.exit(main())
