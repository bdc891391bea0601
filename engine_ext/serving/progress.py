"""How far a prompt is, before its first token: the engine core is asked while somebody watches, and only then.

An engine says nothing of a request before its first token, and a 128k prompt can take minutes. One poller an
engine asks for all watched requests in one call, a few times a second; the answer comes between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from engine_ext import compat
from engine_ext.spreading import under_way
from scheduler.core_utilities import PREFILL_PROGRESS

logger = init_logger("vllm.starling")

INTERVAL_SECONDS = 0.3
PATIENCE_SECONDS = 30.0
"""How long a watched request may take to reach the engine: the front still renders and tokenises it."""


@dataclass(frozen=True)
class Progress:
    """Prompt tokens and star blocks done; a dense prompt has 0 blocks and no context."""

    computed: int
    prompt: int
    cached: int
    context: int
    star_blocks_done: int
    star_blocks: int

    @property
    def done(self) -> bool:
        return self.computed >= self.prompt

    def completed(self) -> Progress:
        return replace(self, computed=self.prompt, star_blocks_done=self.star_blocks)


NUMBERS = tuple(field.name for field in fields(Progress))
ADDED = ("computed", "cached", "star_blocks_done")


def furthest(states: list[dict[str, int]]) -> Progress | None:
    """The progress of the choice that is nearest to its first token; None where none has reached the engine.

    Parts of a prompt that goes over several replicas count together.
    """
    parts = [state for state in states if state.get("part")]
    best = max(states, key=lambda state: state["computed"], default=None)
    if best is None:
        return None
    if len(parts) == len(states):
        best = best | {name: sum(part[name] for part in parts) for name in ADDED}
    return Progress(**{name: best[name] for name in NUMBERS})


class Watch:
    """One watcher of one request: the newest progress, and whether it has ended. Old news are overwritten."""

    def __init__(self, request_id: str, interval: float) -> None:
        self.request_id = request_id
        self.interval = interval
        self.engine_ids: list[str] = []
        self.last: Progress | None = None
        self.ended = False
        self.news = asyncio.Event()
        self.gives_up_at = asyncio.get_running_loop().time() + PATIENCE_SECONDS

    def tell(self, progress: Progress) -> None:
        """Take in what the engine says. A preempted prompt starts over: it is told of again once it gets further."""
        if self.last is None or progress.computed > self.last.computed:
            self.last = progress
            self.news.set()
        if progress.done:
            self.end()

    def end(self) -> None:
        self.ended = True
        self.news.set()


class Poller:
    """Asks one engine for the progress of all watched requests; idle without watchers."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.watches: set[Watch] = set()
        self.task: asyncio.Task | None = None

    def add(self, watch: Watch) -> None:
        self.watches.add(watch)
        if self.task is None:
            self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.watches:
                # Asking comes after the pause, also for the first watcher: a short prompt is done by then, and
                # costs no call; and calls keep their distance however watchers come and go.
                await asyncio.sleep(min(watch.interval for watch in self.watches))
                await self._poll()
        except EngineDeadError:
            pass  # generate() tells
        except Exception:
            logger.exception("the prefill progress can't be read")
        finally:
            self.task = None
            for watch in self.watches:
                watch.end()

    async def _poll(self) -> None:
        for watch in self.watches:
            self._look(watch)
        wanted = sorted({name for watch in self.watches if not watch.ended for name in watch.engine_ids})
        if not wanted:
            return
        states: dict[str, dict[str, int]] = {}
        for of_engine in await compat.call_core(self.engine, PREFILL_PROGRESS, wanted):
            states |= of_engine
        for watch in self.watches:
            progress = furthest([states[name] for name in watch.engine_ids if name in states])
            if progress is not None and not watch.ended:
                watch.tell(progress)

    def _look(self, watch: Watch) -> None:
        """What the front knows itself: whether the request has come, has its first token, or is gone."""
        names = compat.engine_request_ids(self.engine, watch.request_id)
        if not names and watch.request_id in under_way(self.engine):
            return
        if not names:
            if watch.engine_ids or asyncio.get_running_loop().time() > watch.gives_up_at:
                watch.end()
            return
        watch.engine_ids = names
        known = [compat.front_request(self.engine, name) for name in names]
        if any(request is not None and not request.is_prefilling for request in known):
            if watch.last is not None:
                watch.tell(watch.last.completed())
            watch.end()


def poller_of(engine: Any) -> Poller:
    """The poller of an engine, made once and kept on it."""
    poller = getattr(engine, "starling_poller", None)
    if poller is None:
        poller = engine.starling_poller = Poller(engine)
    return poller


async def watch_prefill(
    engine: Any, request_id: str, interval: float = INTERVAL_SECONDS
) -> AsyncGenerator[Progress, None]:
    """Yield a request's progress whenever it has changed, until its prompt is done or it is gone.

    May start before the request does. A prompt that is done within ``interval`` yields nothing. With n > 1 the
    choice that is furthest counts. A dead engine ends it without an error: generate() has that to tell. Close it
    (contextlib.aclosing) where the first token may come before its end.

    Args:
        request_id: as given to AsyncLLM.generate.
        interval: seconds between two looks; the shortest of all watchers' counts for all.
    """
    watch = Watch(request_id, interval)
    poller = poller_of(engine)
    poller.add(watch)
    told: Progress | None = None
    try:
        while True:
            await watch.news.wait()
            watch.news.clear()
            if watch.last is not None and watch.last != told:
                told = watch.last
                yield told
            if watch.ended:
                return
    finally:
        poller.watches.discard(watch)
