"""Prefill progress of prompts, up to their first token: engine cores are polled only while a request is watched.

An engine reports nothing of a request before its first token, and a 128k prompt can take minutes. One poller for each
engine asks for all watched requests in one call to each replica, a few times a second. A replica answers between two of
its steps. One that does not answer is not asked again until it has, and the others' progress does not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Container
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from starling.engine_ext.front.call import current_call, sees_cached
from starling.scheduler.cache_state import PREFILL_PROGRESS
from starling.vllm_compat.front import call_engine_core, engine_request_ids, num_engine_cores, request_state

logger = init_logger("vllm.starling")

INTERVAL_SECONDS = 0.3
ARRIVAL_SECONDS = 30.0
"""Seconds that a watched request may take to reach the engine, while the front still renders and tokenises it."""


@dataclass(frozen=True)
class Progress:
    """Prompt tokens and star blocks done so far. A dense prompt has 0 blocks and no context.

    ``cached`` counts the done tokens that were cached, or is None if the client may not know.
    """

    computed: int
    prompt: int
    cached: int | None
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
    """Return the progress of the choice that is nearest to its first token, or None if none has reached the engine.

    The parts of a prompt that is split over several replicas are added up.

    Args:
        states: results of scheduler/cache_state.prefill_progress for the engine's requests of one client request.
    """
    parts = [state for state in states if state.get("part")]
    best = max(states, key=lambda state: state["computed"], default=None)
    if best is None:
        return None
    if len(parts) == len(states):
        best = best | {name: sum(part[name] for part in parts) for name in ADDED}
    return Progress(**{name: best[name] for name in NUMBERS})


class Watch:
    """One watcher of one request: the newest progress, which replaces older progress, and the end of the watch.

    Several clients may give their requests the same id. In a call of a client, only the call's own requests are
    watched.
    """

    def __init__(self, request_id: str, interval: float) -> None:
        self.request_id = request_id
        self.interval = interval
        self.call = current_call.get()
        self.engine_ids: list[str] = []
        self.last: Progress | None = None
        self.ended = False
        self.changed = asyncio.Event()
        self.arrives_by = asyncio.get_running_loop().time() + ARRIVAL_SECONDS

    def watches(self, engine_id: str) -> bool:
        """Return whether an engine request is one that this watcher may see."""
        return self.call is None or engine_id in self.call.engine_ids

    def update(self, progress: Progress) -> None:
        """Store the engine's progress. A preempted prompt starts over, and counts again once it gets further."""
        if self.last is None or progress.computed > self.last.computed:
            self.last = progress
            self.changed.set()
        if progress.done:
            self.end()

    def end(self) -> None:
        self.ended = True
        self.changed.set()


class ProgressPoller:
    """Poller of one engine's progress for all watched requests; idle without watchers.

    Args:
        waiting: returns the ids of requests that features run, and which the engine may not know.
    """

    def __init__(self, waiting: Callable[[], Container[str]]) -> None:
        self.waiting = waiting
        self.watches: set[Watch] = set()
        self.states: dict[int, dict[str, dict[str, int]]] = {}  # the last answer of each replica
        self.task: asyncio.Task | None = None

    async def watch(
        self, engine: Any, request_id: str, interval: float = INTERVAL_SECONDS
    ) -> AsyncGenerator[Progress, None]:
        """Yield a request's progress whenever it has changed, until its prompt is done or the request is gone.

        The watch may start before the request does. A prompt that is done within ``interval`` yields nothing. With n >
        1 the choice that is furthest counts. If the engine dies, the generator ends without an error, which generate()
        raises. Close the generator (contextlib.aclosing) if the first token may come before its end.

        Args:
            engine: the AsyncLLM of this poller.
            request_id: id as given to AsyncLLM.generate.
            interval: seconds between two polls; the shortest interval of all watchers applies to all.
        """
        watch = Watch(request_id, interval)
        self.watches.add(watch)
        if self.task is None:
            self.task = asyncio.create_task(self._run(engine))
        yielded: Progress | None = None
        show_cached = sees_cached()
        try:
            while True:
                await watch.changed.wait()
                watch.changed.clear()
                if watch.last is not None and watch.last != yielded:
                    yielded = watch.last
                    yield yielded if show_cached else replace(yielded, cached=None)
                if watch.ended:
                    return
        finally:
            self.watches.discard(watch)

    async def _run(self, engine: Any) -> None:
        try:
            while self.watches:
                polls = [asyncio.create_task(self._poll(engine, rank)) for rank in range(num_engine_cores(engine))]
                try:
                    done, _ = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
                    for poll in done:
                        poll.result()
                finally:
                    for poll in polls:
                        poll.cancel()
        except EngineDeadError:
            pass  # generate() raises it
        except Exception:
            logger.exception("the prefill progress can't be read")
        finally:
            self.task = None
            self.states.clear()
            for watch in self.watches:
                watch.end()

    async def _poll(self, engine: Any, rank: int) -> None:
        """Ask one replica repeatedly until nobody watches."""
        while self.watches:
            # The call comes after the pause, also for the first watcher: a short prompt is done by then, and costs no
            # call. And calls keep their distance however watchers come and go.
            await asyncio.sleep(min(watch.interval for watch in self.watches))
            for watch in self.watches:
                self._look_up(engine, watch)
            wanted = sorted({name for watch in self.watches if not watch.ended for name in watch.engine_ids})
            if wanted:
                self.states[rank] = await call_engine_core(engine, rank, PREFILL_PROGRESS, wanted)
                self._update()

    def _update(self) -> None:
        """Give each watcher the latest answers of the replicas."""
        states = {name: state for of_replica in self.states.values() for name, state in of_replica.items()}
        for watch in self.watches:
            progress = furthest([states[name] for name in watch.engine_ids if name in states])
            if progress is not None and not watch.ended:
                watch.update(progress)

    def _look_up(self, engine: Any, watch: Watch) -> None:
        """Check in the front whether the request has arrived, has its first token, or is gone."""
        names = [name for name in engine_request_ids(engine, watch.request_id) if watch.watches(name)]
        if not names and watch.request_id in self.waiting():
            return
        if not names:
            if watch.engine_ids or asyncio.get_running_loop().time() > watch.arrives_by:
                watch.end()
            return
        watch.engine_ids = names
        states = [request_state(engine, name) for name in names]
        if any(state is not None and not state.is_prefilling for state in states):
            if watch.last is not None:
                watch.update(watch.last.completed())
            watch.end()
