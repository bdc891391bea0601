"""A server under a mixed load for a long time: `make soak MINUTES=30`.

The program starts `starling serve` with a tiny random Llama and measures how many requests of the mix it completes in a
second. Then it sends requests at random times, at 80 % of that rate, for a warm-up (a quarter of the minutes, between
one minute and five) and for the minutes themselves. benchmarks/soak/mix.py has the kinds of requests. The capacity is a
figure of this run alone: other work on the machine changes it.

Every 3 seconds it samples each process of the server. Once a minute it waits until all requests have ended: then no
request may run and no page may be in use. It exits with 1 if a request is lost, an answer differs from the first answer
to its prompt, a page stays in use, a process ends, a file stays behind, or a series grows: the 95 % interval of its
slope (benchmarks/soak/trend.py) lies above the bound of benchmarks/soak/series.py. A series whose interval contains the
bound is unclear; a longer run tells more. To tell the growth of vLLM from Starling's, compare `--front http` with
`--front plain`, which get the same requests. Writes results/soak.json and .png;
the server's log is in build/.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import OUT, write_row
from benchmarks.soak.figure import draw
from benchmarks.soak.load import OpenLoop, measure_capacity
from benchmarks.soak.player import Player
from benchmarks.soak.series import Sampler, report_series
from benchmarks.soak.server import soaked_server
from benchmarks.soak.target import HTTP, PLAIN, STARLING, Clients, Target
from benchmarks.soak.verdict import failures
from examples.server import end_on_signals
from starling.v1 import admin_pb2 as admin

ROOT = Path(__file__).resolve().parents[2]
NAME = "soak"
LOAD = 0.8
CAPACITY_SECONDS, SAMPLE_SECONDS, REST_SECONDS = 30, 3, 60


def warm_up_minutes(minutes: float) -> float:
    """A quarter of the run, between one minute and five."""
    return min(max(minutes / 4, 1), 5)


async def soak(target: Target, temporary: Path, minutes: float, console: Console) -> tuple[dict[str, Any], Sampler]:
    """Play the load; returns the run as JSON, and the sampler."""
    async with Clients(target) as clients:
        player, sampler = Player(clients), Sampler(clients, temporary, SAMPLE_SECONDS)
        await player.learn_answers()
        capacity = await measure_capacity(player, CAPACITY_SECONDS)
        console.print(f"Capacity: {capacity:.1f} requests/s. The load: {LOAD * capacity:.1f} requests/s.")
        sampling, loop = asyncio.create_task(sampler.run()), OpenLoop(player, LOAD * capacity)
        started, warm_up = time.monotonic(), warm_up_minutes(minutes)
        rests, shown = [], 0
        while (left := started + (warm_up + minutes) * 60 - time.monotonic()) > 0 and not sampling.done():
            await loop.send(min(REST_SECONDS, left))
            rests.append(await loop.rest())
            if target.front != PLAIN:
                reset = await clients.control("ResetPrefixCache", admin.ResetPrefixCacheRequest())
                rests[-1]["resets_refused"] = int(not reset.reset)
            ledger = player.ledger
            console.print(f"{ledger.requests} requests, {ledger.lost} lost, {ledger.not_sent} not sent", rests[-1])
            for detail in ledger.details[shown:]:
                console.print(detail, style="red")
            shown = len(ledger.details)
        if sampling.done():
            sampling.result()
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    kept = [index for index, hours in enumerate(sampler.times) if hours * 60 >= warm_up]
    series = report_series([sampler.times[i] for i in kept], [sampler.samples[i] for i in kept])
    run = {
        "front": target.front,
        "replicas": target.replicas,
        "minutes": minutes,
        "warm_up_minutes": warm_up,
        "capacity_requests_per_second": round(capacity, 2),
        "rate_requests_per_second": round(LOAD * capacity, 2),
        "requests": player.ledger.as_json(),
        "rests": len(rests),
        "left_after_a_rest": {name: max(rest[name] for rest in rests) for name in rests[0]},
        "processes_ended": int(sampler.samples[0]["processes"] - sampler.samples[-1]["processes"]),
        "series": series,
    }
    return run, sampler


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.soak"
    )
    parser.add_argument("--minutes", type=float, default=30, help="minutes after the warm-up (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="data-parallel replicas (default: %(default)s)")
    fronts = f"{HTTP}: requests over HTTP only, as {PLAIN}, which is vLLM without Starling (default: %(default)s)"
    parser.add_argument("--front", choices=[STARLING, HTTP, PLAIN], default=STARLING, help=fronts)
    args = parser.parse_args()
    if args.minutes < 5:
        reason = "the memory that a server takes at its start would count as growth"
        parser.error(f"--minutes {args.minutes:g} is refused: {reason}. Allowed: 5 or more.")
    if args.replicas < 1:
        parser.error(f"--replicas {args.replicas} is refused: a server has an engine. Allowed: 1 or more.")
    end_on_signals()
    console, log = Console(), ROOT / "build" / f"soak-{args.front}-{args.replicas}.log"
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        with soaked_server(folder, log, args.replicas, args.front) as (server, target):
            before = set((folder / "tmp").iterdir())  # vLLM leaves its own sockets behind
            run, sampler = asyncio.run(soak(target, folder / "tmp", args.minutes, console))
            run["exit_code"] = server.stop()
        run["files_left"] = sorted(path for path in sampler.shared if Path(path).exists())
        run["files_left"] += sorted(path.name for path in set((folder / "tmp").iterdir()) - before)
        run["tracebacks_in_the_log"] = log.read_text(errors="replace").count("Traceback (most recent call last)")
    rows, path = write_row(NAME, "runs", run, ["front", "replicas"])
    draw(rows, OUT / f"{NAME}.png")
    console.print(table(run))
    for line in (found := failures(run)):
        console.print(line, style="red")
    console.print(f"{'Failed' if found else 'Passed'}. Wrote {path}.")
    return int(bool(found))


def table(run: dict[str, Any]) -> Table:
    """The series that have a bound, the fastest growing ones of each verdict first."""
    shown = Table("series", "first", "last", "per hour", "95 % interval", "bound", "verdict")
    judged = [(name, series) for name, series in run["series"].items() if series["verdict"]]
    for name, series in sorted(judged, key=lambda item: (item[1]["verdict"], -item[1]["per_hour"])):
        lower, upper = series["interval"]
        numbers = (f"{series[key]:g}" for key in ("first", "last", "per_hour"))
        shown.add_row(name, *numbers, f"{lower:g} to {upper:g}", f"{series['bound']:g}", series["verdict"])
    return shown


if __name__ == "__main__":
    sys.exit(main())
