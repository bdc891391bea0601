"""The requests of an engine's replicas, as the live page shows them.

Replicas are asked only while somebody looks, and at most once in SHARE_SECONDS for all viewers together. A replica
answers between two of its steps. One that has not answered is not asked again, and its previous answer is shown with
its age.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from prometheus_client.registry import Collector
from vllm.v1.metrics.prometheus import get_prometheus_registry

from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.progress import ADDED, furthest
from starling.features.live.core import LISTED, shortened
from starling.features.replicas.split.split_state import retrieve_error
from starling.scheduler.cache_state import LIVE_REQUESTS
from starling.vllm_compat.front import call_engine_core, num_engine_cores, request_state

SHARE_SECONDS = 0.5
"""Seconds for which one snapshot serves all viewers."""

WAIT_SECONDS = 1.0
"""Seconds for which a snapshot waits for the replicas."""

TOTALS_SECONDS = 2.0
"""Seconds for which totals are reused. Reading them takes as long as a scrape of /metrics."""

KEEP_SECONDS = 10.0
"""Seconds for which answers are kept after the last look."""

OF_ENGINE = re.compile(r"-[0-9a-f]{8}$")
"""Suffix that vLLM appends to the id that a front gives a request."""

TOTALS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generated_tokens",
    "starling:cached_tokens_total": "cached_tokens",
    "starling:computed_tokens_total": "computed_tokens",
    "starling:keys_attended_total": "keys_attended",
    "starling:keys_dense_total": "keys_dense",
}
"""Names of /metrics series, and the names of their sums in a snapshot."""

Row = dict[str, Any]


class LiveView:
    """Snapshots of one engine's requests.

    Args:
        engine: an AsyncLLM.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.answers: dict[int, tuple[float, dict[str, Any]]] = {}  # replica -> when it came, and its last answer
        self.calls: dict[int, asyncio.Task] = {}
        # Split prompt, by id -> the furthest numbers of its parts, and whether the whole request has begun.
        self.of_parts: dict[str, tuple[Row, bool]] = {}
        self.snapshot: tuple[float, asyncio.Task[bytes]] | None = None  # when it was begun
        self.totals: tuple[float, dict[str, float]] = (float("-inf"), {})
        self.forgetting: asyncio.TimerHandle | None = None

    async def body(self) -> bytes:
        """Return the newest snapshot as JSON (docs/monitoring.md), at most SHARE_SECONDS old.

        Raises:
            EngineDeadError: the server's engines are dead.
            RetryableRequestError: the server is shutting down.
        """
        loop = asyncio.get_running_loop()
        if self.forgetting is not None:
            self.forgetting.cancel()
        self.forgetting = loop.call_later(KEEP_SECONDS, self._forget)
        if self.snapshot is None or (self.snapshot[1].done() and loop.time() - self.snapshot[0] >= SHARE_SECONDS):
            made = loop.create_task(self._make())
            made.add_done_callback(retrieve_error)
            self.snapshot = loop.time(), made
        return await asyncio.shield(self.snapshot[1])

    def _forget(self) -> None:
        self.snapshot = None
        self.answers.clear()
        self.of_parts.clear()

    async def _make(self) -> bytes:
        totals, _ = await asyncio.gather(self._totals(), self._ask())
        now = asyncio.get_running_loop().time()
        replicas = [self._replica(rank, now) for rank in range(num_engine_cores(self.engine))]
        rows, waiting_for_engine = self._rows()
        config = self.engine.vllm_config.model_config
        names = config.served_model_name
        shown = {
            "time": time.time(),
            "model": names if isinstance(names, str) else names[0],
            "replicas": replicas,
            "totals": totals,
            "requests": rows[:LISTED],
            "not_listed": max(len(rows) - LISTED, 0) + sum(self._not_listed(rank) for rank in self.answers),
            "waiting_in_front": waiting_for_engine,
            "ended": self._ended(now)[:LISTED],
        }
        return json.dumps(shown, separators=(",", ":")).encode()

    async def _ask(self) -> None:
        """Ask the replicas that have no call pending, and wait for all of them for at most WAIT_SECONDS."""
        for rank in range(num_engine_cores(self.engine)):
            if rank not in self.calls:
                self.calls[rank] = asyncio.ensure_future(self._call(rank))
                self.calls[rank].add_done_callback(retrieve_error)
        await asyncio.wait(self.calls.values(), timeout=WAIT_SECONDS)
        for rank, call in list(self.calls.items()):
            if call.done():
                del self.calls[rank]
                self.answers[rank] = call.result()

    async def _call(self, rank: int) -> tuple[float, dict[str, Any]]:
        answer = await call_engine_core(self.engine, rank, LIVE_REQUESTS)
        return asyncio.get_running_loop().time(), answer

    async def _totals(self) -> dict[str, float]:
        now = asyncio.get_running_loop().time()
        if now - self.totals[0] >= TOTALS_SECONDS:
            # In a thread: with several processes, the registry reads the files of all of them.
            self.totals = now, await asyncio.to_thread(read_totals, get_prometheus_registry())
        return self.totals[1]

    def _replica(self, rank: int, now: float) -> dict[str, Any]:
        """Return a replica's numbers of requests and the age of its answer, each None if it has not answered yet."""
        if rank not in self.answers:
            return {"replica": rank, "age": None, "running": None, "waiting": None}
        at, answer = self.answers[rank]
        return {"replica": rank, "age": round(now - at, 2), "running": answer["running"], "waiting": answer["waiting"]}

    def _not_listed(self, rank: int) -> int:
        answer = self.answers[rank][1]
        number: int = answer["running"] + answer["waiting"] - LISTED
        return max(number, 0)

    def _rows(self) -> tuple[list[Row], int]:
        """Return the requests of all replicas, running first, then oldest first, and how many only this front knows."""
        wholes: list[Row] = []
        parts: dict[str, list[Row]] = {}
        for rank, (_, answer) in sorted(self.answers.items()):
            for state in answer["requests"]:
                row = self._row(rank, state)
                if state["part"]:
                    parts.setdefault(row["id"], []).append(row)
                else:
                    wholes.append(row)
        known = {row["id"] for row in wholes}
        # A part may still be listed by one replica when another one lists the whole prompt already.
        rows = wholes + [merged(of_one) for name, of_one in parts.items() if name not in known]
        split = {shortened(name) for name in front_state(self.engine).waiting()}
        rows.sort(key=lambda row: (row["status"] != "running", row["arrived"]))
        unknown = split - known - parts.keys()
        self._keep_numbers_of_parts(rows, unknown)
        return rows, len(unknown)

    def _keep_numbers_of_parts(self, rows: list[Row], unknown: set[str]) -> None:
        """Keep the numbers of split prompts from falling when one part ends before others, or when the whole begins.

        Args:
            unknown: ids of split prompts that no replica knows now.
        """
        of_parts = {name: self.of_parts[name] for name in unknown & self.of_parts.keys()}
        for row in rows:
            numbers, had_begun = self.of_parts.get(row["id"], ({}, False))
            if row["part"] and had_begun:  # another request with the same id
                numbers = {}
            if numbers.get("computed", 0) > row["computed"]:
                row |= numbers
            elif row["split"]:
                row["cached"] = numbers.get("cached")
            if row["part"]:
                numbers = {name: row[name] for name in ADDED}
            if numbers:
                of_parts[row["id"]] = numbers, not row["part"]
        self.of_parts = of_parts

    def _row(self, rank: int, state: Mapping[str, Any]) -> Row:
        """Return a request as its replica knows it, and as this front knows it if the request is its own."""
        row = {**state, "on": [rank], "seconds": round(state["seconds"], 2)}
        of_front = request_state(self.engine, state["id"])
        if of_front is None:  # another API server's, or an id that is cut
            row["id"] = OF_ENGINE.sub("", state["id"])
        else:
            row["id"] = shortened(of_front.external_req_id)
            if state["cached"] is None and not (state["split"] or of_front.is_prefilling):
                row["cached"] = of_front.num_cached_tokens
        return row

    def _ended(self, now: float) -> list[Row]:
        """Return the requests that have ended, the most recent first."""
        rows = []
        for rank, (at, answer) in self.answers.items():
            for state in answer["ended"]:
                age = round(state["ended_seconds"] + now - at, 2)
                rows.append(self._row(rank, state) | {"ended_seconds": age})
        return sorted(rows, key=lambda row: row["ended_seconds"])


def merged(parts: list[Row]) -> Row:
    """Merge the parts of one prompt into one request that is waiting or running on several replicas."""
    progress = furthest([part | {"cached": part["cached"] or 0} for part in parts])
    assert progress is not None
    first = max(parts, key=lambda part: part["status"] == "running")
    return first | asdict(progress) | {"on": sorted(rank for part in parts for rank in part["on"])}


def read_totals(registry: Collector) -> dict[str, float]:
    """Return the sums of series since the server's start, without series that no process has yet."""
    sums: dict[str, float] = {}
    for sample in chain.from_iterable(family.samples for family in registry.collect()):
        if sample.name in TOTALS:
            sums[TOTALS[sample.name]] = sums.get(TOTALS[sample.name], 0.0) + sample.value
    return sums
