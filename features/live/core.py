"""One engine's requests for the live page: plain numbers and names, read between two steps.

Nothing is noted before the first look, and everything is forgotten when nobody has looked for a while.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from starling.config.entry import StarlingConfig
from starling.scheduler.cache_state import LIVE_REQUESTS, progress_of
from starling.scheduler.part import CorePart
from starling.scheduler.planning.plan import describe
from starling.scheduler.planning.request_metadata import SOURCES, metadata_of
from starling.vllm_compat.core_process import add_core_utility
from starling.vllm_compat.scheduler_view import SchedulerView

LISTED = 100
"""Most requests in a snapshot; its counts include all requests."""

ENDED, ENDED_SECONDS = 50, 60.0
"""Most ended requests in a snapshot, and the seconds for which it has them."""

WATCH_SECONDS = 10.0
"""Seconds after a look in which requests are noted for the next one."""

MAX_ID = 200
"""Most characters of a request's id that are shown: clients choose ids of any length."""

PLAN = ("attention", "block_size", "documents", "replicas", "shards", "keys_attended", "dense_keys", "why")


def shortened(request_id: str) -> str:
    """Return an id in the form that is shown."""
    return request_id if len(request_id) <= MAX_ID else f"{request_id[: MAX_ID - 1]}…"


class LiveRequests(CorePart):
    """The requests of one scheduler that the live page shows.

    Attributes:
        looked: when somebody looked last, or None if nobody has for a while, so that nothing is noted.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._forget()

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> LiveRequests:
        add_core_utility(LIVE_REQUESTS, live_requests)
        return cls(scheduler)

    def _forget(self) -> None:
        self.looked: float | None = None
        self.cached: dict[str, int] = {}  # request -> prompt tokens found in the prefix cache, from its first output on
        self.sources: dict[str, dict[str, int]] = {}  # request -> where its documents came from, from then on too
        self.plans: dict[str, dict[str, Any]] = {}
        self.ended: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=ENDED)  # with the time and the engine's id

    def look(self) -> dict[str, Any]:
        """Return the current requests; from now on, and for a while, note what the next look shows.

        Returns:
            ``running`` and ``waiting``, the numbers of all requests; ``requests``, the states of the first LISTED ones
            (running ones before waiting ones); ``ended``, the states of requests that ended since the first look.
        """
        self.looked = now = time.monotonic()
        scheduler = self.scheduler
        for notes in (self.cached, self.sources, self.plans):
            for name in notes.keys() - scheduler.requests.keys():
                del notes[name]
        while self.ended and now - self.ended[0][0] > ENDED_SECONDS:
            self.ended.popleft()
        running, waiting = scheduler.get_request_counts()
        states = (self._state(request) for request in islice(self._requests(), LISTED))
        return {
            "running": running,
            "waiting": waiting,
            "requests": [state for state in states if state is not None],
            "ended": [state | {"ended_seconds": now - ended} for ended, _, state in reversed(self.ended)],
        }

    def outputs(self, outputs: dict[int, Any]) -> None:
        """Note the prefix hits of a step's first tokens, which vLLM forgets when it hands them on."""
        if self.looked is None:
            return
        if time.monotonic() - self.looked >= WATCH_SECONDS:
            self._forget()
            return
        for output in chain.from_iterable(of_client.outputs for of_client in outputs.values()):
            if output.prefill_stats is not None:
                self.cached[output.request_id] = output.prefill_stats.num_cached_tokens
            documents = (output.kv_transfer_params or {}).get(SOURCES)
            if documents:
                self.sources[output.request_id] = dict(sum(map(Counter, documents), Counter()))
        for _, name, state in self.ended:
            if name in self.sources:
                state["sources"] = self.sources.pop(name)
            if name in self.cached and not state["split"]:  # it has ended with its first token
                state["cached"] = self.cached.pop(name)

    def pages_freed(self, request: Any) -> None:
        """Note a request that has ended, unless it prefilled a part of a prompt, which goes on."""
        if self.looked is None or not request.is_finished() or metadata_of(request).part is not None:
            return
        state = self._state(request)
        if state is None:
            return
        ended = state | {"finish_reason": str(request.get_finished_reason())}
        self.ended.append((time.monotonic(), request.request_id, ended))

    def _requests(self) -> Iterator[Any]:
        """Yield running requests, then waiting ones, in the order in which they came."""
        running = self.scheduler.running
        others = (request for request in self.scheduler.requests.values() if not request.is_finished())
        known = {id(request) for request in running}
        return chain(running, (request for request in others if id(request) not in known))

    def _state(self, request: Any) -> dict[str, Any] | None:
        """Return the state of one request, or None for a part of a prompt that only computes the anchor once more."""
        progress: dict[str, Any] | None = progress_of(request)
        if progress is None:
            return None
        name, metadata = request.request_id, metadata_of(request)
        split = metadata.is_split and metadata.part is None
        if split:  # what it did not compute, other replicas have computed
            progress["cached"] = None
        elif SchedulerView.cached_tokens(request) is None:
            progress["cached"] = self.cached.get(name)
        if name not in self.plans:
            model = self.scheduler.vllm_config.model_config.hf_text_config
            shown = describe(metadata.plan, request.num_prompt_tokens, model, metadata.why)
            self.plans[name] = {key: shown[key] for key in PLAN if key in shown}
        state = {
            "id": shortened(name),
            "status": request.status.name.lower(),
            "arrived": request.arrival_time,
            "seconds": max(time.time() - request.arrival_time, 0.0),
            "generated": request.num_output_tokens,
            "max_tokens": request.max_tokens,
            "preemptions": request.num_preemptions,
            "split": split,
            "sources": self.sources.get(name, {}),
        }
        return state | progress | self.plans[name]


def live_requests(core: Any) -> dict[str, Any]:
    """Return the requests of an engine core to a front that asks for them (scheduler/cache_state.py)."""
    found: dict[str, Any] = core.scheduler.part(LiveRequests).look()
    return found


PARTS = (LiveRequests.make,)
