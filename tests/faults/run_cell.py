"""Runs one cell: brings requests to the moment, begins the fault, looks at what clients see and at what is left."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from tests.e2e.wait import wait_until
from tests.faults.clients import ANSWER, CLIENTS, CLOSED, ERROR, WRONG, Outcome, Request, Running, wrong_answers
from tests.faults.faults import FAULTS
from tests.faults.place import Place
from tests.faults.served import HealthLog, Served
from tests.faults.table import DECODE, IDLE, PREFILL, SIGNALS, TRANSFER, Cell

ATTEMPTS, MOMENT_SECONDS = 10, 60
EXIT_SECONDS, GONE_SECONDS, RELEASE_SECONDS = 30, 20, 40
STAR = {"star": "on", "star_block_size": 256, "star_query_tokens": 40, "star_replicas": 2}
SIZES = {IDLE: (1000, 8), PREFILL: (3000, 8), TRANSFER: (1500, 8), DECODE: (1000, 800)}
"""Moment -> tokens of a prompt and of its output."""

seeds = itertools.count(time.time_ns())


class MomentMissed(Exception):
    """The requests did not come to the moment, or were beyond it when the fault began."""


@dataclass
class Result:
    """What a cell showed; JSON takes it as it is.

    Attributes:
        ends: client -> how its request ended.
        http_health, grpc_health: what the server said of itself, each value once.
        exit: the server's exit code; None: it runs.
        left: what was left behind, each with a number.
        faults: what differs from what is expected; empty: nothing.
        seconds: from the begin of the fault to the end of the last request.
        messages: of errors, by client.
    """

    ends: dict[str, str] = field(default_factory=dict)
    http_health: list[str] = field(default_factory=list)
    grpc_health: list[str] = field(default_factory=list)
    exit: int | None = None
    left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory_mib: int = 0
    messages: dict[str, str] = field(default_factory=dict)


def run_cell(served: Served, cell: Cell) -> Result:
    """The result of a cell. On a busy machine requests may be beyond the moment when the fault begins: then again.

    Raises:
        MomentMissed: the requests missed the moment in each of ATTEMPTS attempts.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(MomentMissed):
            return attempt(served, cell)
    return attempt(served, cell)


def attempt(served: Served, cell: Cell) -> Result:
    """The result of a cell.

    Raises:
        MomentMissed: the requests did not come to the moment.
    """
    fault, result = FAULTS[cell.fault], Result()
    seconds = cell.expected.seconds + (fault.seconds if fault.seconds < float("inf") else 0) + MOMENT_SECONDS
    if cell.moment == TRANSFER:
        served.shut_gate()
    running = [] if cell.moment == IDLE else start(served, cell, seconds)
    try:
        reach(served, cell.moment, running)
    except MomentMissed:
        served.open_gate()
        wait_until(lambda: all(each.ended for each in running), MOMENT_SECONDS)
        raise
    tokens = [len(each.outcome.tokens) for each in running]
    with fault.begin(served, cell.target):
        began = time.monotonic()
        if any(each.ended for each in running) or (cell.moment in (PREFILL, TRANSFER) and any(tokens)):
            raise MomentMissed("requests were beyond the moment")
        health = HealthLog(served)
        served.open_gate()
        running = running or start(served, cell, seconds)
        limit = min(fault.seconds, cell.expected.seconds)
        wait_until(lambda: all(each.ended for each in running), limit)
    passed = began if fault.seconds == float("inf") else time.monotonic()
    wait_until(lambda: all(each.ended for each in running), passed + cell.expected.seconds - time.monotonic())
    result.seconds = round(max(each.outcome.ended for each in running) - began, 1)
    if cell.expected.exit is None:
        look_at_survivor(served, running, result)
    else:
        look_at_dead(served, result)
    health.stop()
    result.http_health, result.grpc_health = health.http, health.grpc
    result.ends = {each.client: ending(each.outcome) for each in running}
    result.messages = {each.client: each.outcome.message for each in running if each.outcome.message}
    result.faults = differences(cell, result)
    return result


def ending(outcome: Outcome) -> str:
    """The kind, and the status that goes with an error."""
    return f"{outcome.kind} ({outcome.status})" if outcome.kind == ERROR else outcome.kind


def start(served: Served, cell: Cell, seconds: float) -> list[Running]:
    """One request of each client, each with a prompt that the server has not seen."""
    length, max_tokens = SIZES[cell.moment]
    star = (
        {} if cell.server == "one engine" else STAR | {"star_shards": "on" if cell.server.endswith("shards") else "off"}
    )
    prompts = (random.Random(seed).choices(range(3, 250), k=length) for seed in seeds)
    return [
        Running(
            client, served.http, served.server.grpc, Request(served.server.model, prompt, max_tokens, star), seconds
        )
        for client, prompt in zip(CLIENTS, prompts, strict=False)
    ]


def reach(served: Served, moment: str, running: Sequence[Running]) -> None:
    """Wait until the requests are at the moment.

    Raises:
        MomentMissed: they do not come to it.
    """

    def there() -> bool:
        if moment == IDLE:
            return True
        if moment == TRANSFER:
            return served.at_gate()
        engines = served.engines(per_request=True, seconds=MOMENT_SECONDS)
        requests = [request for engine in engines for request in engine.requests]
        if moment == PREFILL:
            known = sum(engine.requests_running + engine.requests_waiting for engine in engines)
            busy = all(any(0 < r.computed_tokens < r.prompt_tokens for r in engine.requests) for engine in engines)
            return busy and known >= len(running)
        generating = [request for request in requests if request.computed_tokens > request.prompt_tokens]
        streams = [each for each in running if each.client.endswith("stream")]
        return len(generating) == len(running) and all(each.outcome.tokens for each in streams)

    reached = wait_until(lambda: there() or any(each.ended for each in running), MOMENT_SECONDS)
    if not reached or any(each.ended for each in running):
        raise MomentMissed(f"{moment}: {[(each.client, each.outcome) for each in running if each.ended]}")


def look_at_survivor(served: Served, running: Sequence[Running], result: Result) -> None:
    """Compare the answers with the model's, and look for requests and pages that are still held."""
    state = ""

    def released() -> bool:
        nonlocal state
        try:
            engines = served.engines()
        except grpc.RpcError as error:
            state = f"GetCacheState: {error.code().name}"
            return False
        counts = {
            "pages": sum(engine.pages_used for engine in engines),
            "requests": sum(engine.requests_running + engine.requests_waiting for engine in engines),
        }
        state = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return not state

    if not wait_until(released, RELEASE_SECONDS):
        result.left.append(state)
    result.exit = served.server.process.poll()
    with contextlib.suppress(Exception), served.http() as http:
        for each in wrong_answers(http, [each for each in running if each.outcome.kind == ANSWER]):
            each.outcome.kind = WRONG
    result.memory_mib = served.memory() >> 20


def look_at_dead(served: Served, result: Result) -> None:
    """Wait for the end of the server, and look for processes, ports and files that are left."""
    try:
        result.exit = served.server.process.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        result.left.append("the server, which still runs")
        return
    wait_until(lambda: not served.place.processes(), GONE_SECONDS)
    result.left += summary(process.name() for process in served.place.processes())
    result.left += served.open_ports()
    result.left += summary(pattern(path) for path in served.place.files())


def look_at_failed_start(cell: Cell, here: Place, error: RuntimeError) -> Result:
    """The result of a cell whose server did not start."""
    code = re.search(r"ended with exit code (-?\d+)", str(error))
    result = Result({client: CLOSED for client in CLIENTS}, ["closed"], ["closed"], int(code[1]) if code else None)
    wait_until(lambda: not here.processes(), GONE_SECONDS)
    result.left += summary(process.name() for process in here.processes())
    result.left += summary(pattern(path) for path in here.files() if not path.endswith("/filler"))
    result.messages["log"] = str(error).splitlines()[-1]
    result.faults = differences(cell, result)
    return result


def pattern(path: str) -> str:
    """A path without numbers and random names."""
    path = re.sub(r"(psm_|sem\.mp-|starling-metrics-|starling-|vllm_dist_|/tmp/tmp)[^/-]+", r"\1*", path)
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\d+", "*", path)


def summary(names: Any) -> list[str]:
    return [f"{count} {name}" for name, count in Counter(names).items()]


def differences(cell: Cell, result: Result) -> list[str]:
    """What a cell showed that is not expected."""
    kinds = {client: end.split(" ")[0] for client, end in result.ends.items()}
    found = [f"{client}: {kind}" for client, kind in kinds.items() if kind not in cell.expected.ends]
    for name, said, allowed in (
        ("/health", result.http_health, cell.expected.http_health),
        ("gRPC health", result.grpc_health, cell.expected.grpc_health),
    ):
        found += [f"{name}: {value}" for value in said if value not in allowed]
    # A server without requests ends too fast to say it for sure.
    says_so = "NOT_SERVING" in cell.expected.grpc_health and not (cell.fault in SIGNALS and cell.moment == IDLE)
    if says_so and "NOT_SERVING" not in result.grpc_health:
        found.append("gRPC health never said NOT_SERVING")
    if result.exit != cell.expected.exit:
        found.append(f"exit code {result.exit}")
    return found + [f"left: {what}" for what in result.left]
