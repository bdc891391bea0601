"""One long prompt split over several replicas: its parts are prefilled there, then the whole request uses their KV.

With ``star_shards`` the KV stays on the replicas that computed it until the request ends. Without, the replica that
runs the request fetches it.

From its admission on, the request counts for vLLM's limits, once. It is known by its id, to Abort and to Drain, also
while the engine does not have it. Its preparation is a task of its own, which is cancelled once at most, however often
the client's task is: so each part is aborted before its pages are released.

Runs in place of AsyncLLM.generate, where HTTP and gRPC meet (front.py). Each replica with a part first computes the
anchor, unless the anchor is in its cache: all replicas do so at the same time, so fetching the anchor from another one
could only be later. The parts run under the request's own id and priority, so that an abort of that id ends them, and
its progress counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vllm import tracing
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from starling.features.front_request import TRACE_HEADERS, FrontRequest, empty_output
from starling.features.replicas.page_transfer import layout_mismatch
from starling.features.replicas.split.engine_replica import (
    EngineReplica,
    HeldPart,
    PartAborted,
    SplitPrompt,
    while_answering,
)
from starling.features.replicas.split.split_state import ReplicaUnavailable, SplitState, split_metrics
from starling.scheduler.planning.assignment import Assignment, KVDemand, ReplicaState, assign_blocks
from starling.scheduler.planning.plan import StarPlan, pad, work
from starling.scheduler.planning.request_metadata import KEY, LOST, PageFetch, RemoteShards, RequestMetadata, Shard
from starling.vllm_compat.admission_limits import Admission, RequestWithdrawn, admit, admitted_outputs, withdraw
from starling.vllm_compat.front import abort_in_engine_cores, engine_request_ids, num_engine_cores, request_state

logger = init_logger("vllm.starling")

RELEASE_SECONDS = 2.0
"""Seconds that a request's end waits for its pages to be released."""

Task = PageFetch | RemoteShards
"""Task of the whole request: it fetches the pages of other replicas, or attends to them there."""


def is_split(request: FrontRequest) -> bool:
    """Return whether a request's prompt is split over several replicas. If not, vLLM chooses one replica for it."""
    prompt, params = request.prompt, request.params
    if not isinstance(prompt, Mapping) or prompt.get("type") != "token" or not isinstance(params, SamplingParams):
        return False
    if request.keywords.get("data_parallel_rank") is not None or params.skip_reading_prefix_cache:
        return False
    if params.prompt_logprobs is not None:  # one engine has to compute the whole prompt
        return False
    decision = request.decision
    return decision is not None and decision.plan is not None and decision.plan.replicas > 1


class ShardLost(RuntimeError):
    """A request could not go on, because a replica that holds a part of its KV can't be reached."""


class SplitPrefill:
    """One request whose prompt is split over the replicas.

    Args:
        state: what the front keeps of the replicas.
        page_size: tokens of a KV page.
    """

    def __init__(self, state: SplitState, request: FrontRequest, page_size: int) -> None:
        planned = request.decision
        assert planned is not None
        assert planned.plan is not None
        assert planned.token_ids is not None
        self.state, self.request, self.page_size = state, request, page_size
        self.engine, self.request_id = request.engine, request.request_id
        self.token_ids: Sequence[int] = planned.token_ids
        self.plan: StarPlan = planned.plan
        self.capacity: dict[int, int] = {}  # rank -> pages of its memory
        self.admission: Admission  # made before the request can be aborted
        self.aborted = asyncio.Event()
        self.aborted_ids: list[str] = []  # the engine's own, of what it had at each abort
        self.tasks: list[asyncio.Task] = []  # the request's end cancels them
        self.under_way: set[asyncio.Future] = set()  # parts and the reservation, which end with their tasks
        padded = pad(self.plan, planned.token_ids)
        shared = SplitPrompt(
            self.request_id, padded, self.plan, page_size, request.prompt, request.keywords, request.lora
        )
        self.replicas = {
            rank: EngineReplica(state, self.engine, rank, shared, self.under_way)
            for rank in range(num_engine_cores(self.engine))
        }
        self.reader: EngineReplica | None = None  # the replica whose request may read pages of others now
        self.has_output = False
        self._releasing: asyncio.Task | None = None

    def abort(self) -> None:
        """End the request, unless the engine has it: then the engine ends it."""
        self.aborted.set()
        self.aborted_ids += engine_request_ids(self.engine, self.request_id)
        withdraw(self.engine, self.admission)

    async def outputs(self) -> AsyncGenerator[Any, None]:
        """Prefill the parts, then yield what the whole request yields on the replica of the first part.

        Raises:
            QueueOverflowError, MaxQueuedTokensError: the server's limits are reached; raised before anything is done.
            ReplicaUnavailable: no replica answers, or, with shards, one with a part does not.
            ShardLost: a replica that holds a part of the KV was lost.
        """
        params = self.request.params
        self.admission = admission = admit(self.engine, self.request_id, params.n, len(self.token_ids))
        self.state.split_requests.add(self)
        self.state.let_split_requests_end(self.engine)
        has_ended = False
        try:
            preparing = self._start(self._prepare(params))
            aborting = asyncio.ensure_future(self.aborted.wait())
            try:
                await asyncio.wait({preparing, aborting}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                aborting.cancel()
            prepared = None if self.aborted.is_set() else preparing.result()
            if prepared is None:
                yield empty_output(self.request_id, self.token_ids, params.n)
                return
            rank, task = prepared
            self.reader = None if task is None else self.replicas[rank]
            if task is None:  # nothing reads the parts, and another request may wait for their pages
                self.release()
            elif isinstance(task, RemoteShards):
                split_metrics().shard_requests.inc()
                self._start(self._release_when_ended())
            else:
                self._start(self._release_when_fetched())
            keywords = {**self.request.keywords, "data_parallel_rank": rank}
            whole = replace(self.request, params=with_task(params, task), keywords=keywords).outputs()
            async with contextlib.aclosing(admitted_outputs(whole, admission)) as outputs:
                async for output in outputs:
                    lost = (output.kv_transfer_params or {}).get(LOST)
                    if lost is not None:
                        raise ShardLost(f"the replica that holds a part of the prompt's KV is unavailable: {lost}")
                    has_ended, self.has_output = output.finished, True
                    yield output
        except RequestWithdrawn:  # aborted while it was handed over
            yield empty_output(self.request_id, self.token_ids, params.n)
        finally:
            withdraw(self.engine, admission)
            self.state.split_requests.remove(self)
            await self._end(None if has_ended else admission.engine_request_id)

    async def _prepare(self, params: SamplingParams) -> tuple[int, Task | None] | None:
        """Prefill the parts; returns the replica of the whole request, and what that does with others' pages.

        None: a client has aborted the parts, by the request's id.
        """
        started = time.monotonic()
        states = await self._replica_states()
        ranks = list(states)
        anchor_work = self.plan.anchor_size / self.plan.block_size
        by_index = assign_blocks(work(self.plan), anchor_work, list(states.values()), self.plan.replicas)
        assignments = [replace(assignment, replica=ranks[assignment.replica]) for assignment in by_index]
        first = assignments[0].replica
        for number in self.replicas.keys() - {each.replica for each in assignments}:
            self._start(self.replicas[number].release())
        if len(assignments) == 1:
            return first, None
        try:
            await self._reserve(self._demand.pages_of(assignments, params))
            parts = await self._prefill(assignments)
        except PartAborted:
            return None
        except ReplicaUnavailable as error:
            if self.plan.shards:  # one replica may not have the memory
                raise
            rank = next((rank for rank in ranks if not self.replicas[rank].has_failed), ranks[0])
            logger.error("%s: %s; replica %d computes the whole prompt", self.request_id, error, rank)
            return rank, None
        task = self._task(parts)
        blocks = {str(each.replica): each.stop - each.first for each in assignments}
        split_metrics().count_split(blocks, time.monotonic() - started)
        return first, task

    async def _reserve(self, wanted: Mapping[int, int]) -> None:
        """Reserve pages by rank, as long as these replicas answer."""

        async def reserve() -> None:
            reservation = await self.state.reservations.reserve(wanted, self.capacity)
            for rank in wanted:
                self.replicas[rank].reservation = reservation

        await while_answering([self.replicas[rank].check for rank in wanted], reserve(), self.under_way)

    def _start(self, work: Any) -> asyncio.Task:
        """Begin a task that the request's end cancels, and waits for."""
        task = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    async def _end(self, engine_request_id: str | None) -> None:
        """Release everything: at once where replicas answer; the client does not wait for one that does not.

        Args:
            engine_request_id: the engine's id of the whole request, where that has to be aborted.
        """
        ending = asyncio.ensure_future(self._stop_and_release(engine_request_id))
        self.state.releases.add(ending)
        ending.add_done_callback(self.state.releases.discard)
        await asyncio.wait({ending}, timeout=RELEASE_SECONDS)

    async def _stop_and_release(self, engine_request_id: str | None) -> None:
        """End the request's tasks, then itself, and release the pages when no engine uses them any more."""
        for task in self.tasks:
            task.cancel()
        while running := {task for task in self.tasks if not task.done()} | self.under_way:
            await asyncio.wait(running)
        for task in self.tasks:
            if not task.cancelled():
                task.exception()  # the client got it, unless it has left
        if engine_request_id is not None:
            # vLLM forgets to abort a request whose client leaves while it is handed to the engine.
            await self.engine.abort(engine_request_id, internal=True)
        if self.aborted_ids:
            await abort_in_engine_cores(self.engine, self.aborted_ids)
        await self.release()

    def release(self) -> asyncio.Task:
        """Begin to release everything, once; a second call returns the same task.

        To be called when no part runs any more. Nothing may cancel the task.
        """
        if self._releasing is None:
            self._releasing = asyncio.ensure_future(self._release_all())
        return self._releasing

    async def _release_all(self) -> None:
        if self.reader is not None:
            await self.reader.settle()
        await asyncio.gather(*(replica.release() for replica in self.replicas.values()))

    @property
    def _demand(self) -> KVDemand:
        return KVDemand(self.plan, self.page_size, self.capacity)

    def _task(self, parts: Sequence[HeldPart | None]) -> Task | None:
        """Return what the whole request does with the pages of the finished parts."""
        if not self.plan.shards:
            sources = tuple(part.source for part in parts[1:] if part)
            return PageFetch(sources) if sources else None
        held = [part for part in parts if part is not None]
        shards = tuple(
            Shard(part.name, part.source.start, len(part.source.page_ids) * self.page_size, part.query_addresses)
            for part in held[1:]
        )
        return RemoteShards(held[0].name, shards) if shards else None

    async def _replica_states(self) -> dict[int, ReplicaState]:
        """Ask each replica what it has cached of the prompt, and how busy it is; return the answers by rank.

        Raises:
            ReplicaUnavailable: none answers.
            ValueError: the pages of two of them have different layouts.
        """
        calls = (replica.state() for replica in self.replicas.values())
        answers = dict(zip(self.replicas, await asyncio.gather(*calls, return_exceptions=True), strict=True))
        for answer in answers.values():
            if isinstance(answer, BaseException) and not isinstance(answer, ReplicaUnavailable):
                raise answer
        states = {rank: answer for rank, answer in answers.items() if not isinstance(answer, BaseException)}
        if not states:
            raise next(answer for answer in answers.values() if isinstance(answer, BaseException))
        layouts = {rank: state["layout"] for rank, state in states.items()}
        first = next(iter(layouts))
        for rank, layout in layouts.items():
            reason = layout_mismatch(layouts[first], layout)
            if reason is not None:
                raise ValueError(f"replicas {first} and {rank} can't share a prompt: {reason}")
        self.capacity = {rank: state["pages"] for rank, state in states.items()}
        return {
            rank: ReplicaState(
                state["cached"],
                state["has_anchor"],
                state["queued_tokens"] / self.plan.block_size,
                self._demand.max_blocks(rank) if self.plan.shards else math.inf,
            )
            for rank, state in states.items()
        }

    async def _prefill(self, assignments: Sequence[Assignment]) -> list[HeldPart | None]:
        """Prefill all parts; returns them in the order of the assignments.

        Raises:
            PartAborted: a client has aborted the parts.
            EngineDeadError: an engine of this server is dead. vLLM aborts the parts on the others before that is known.
        """
        parts = [asyncio.create_task(self._prefill_part(each)) for each in assignments]
        try:
            ended = await asyncio.gather(*parts)
        except BaseException:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)  # the first one's error is raised
            raise
        aborted = next((part for part in ended if isinstance(part, PartAborted)), None)
        if aborted is not None:
            raise aborted
        return [part for part in ended if not isinstance(part, PartAborted)]

    async def _prefill_part(self, assignment: Assignment) -> HeldPart | PartAborted | None:
        """Prefill one part. All parts end with an abort, so it is returned, not raised."""
        replica, blocks = self.replicas[assignment.replica], assignment.stop - assignment.first
        try:
            with part_span(self.request.keywords, replica=str(replica.rank), star_blocks=blocks) as attributes:
                held = await replica.prefill(assignment.first, assignment.stop)
                attributes["pages"] = len(held.source.page_ids) if held else 0
                return held
        except PartAborted as aborted:
            return aborted

    async def _release_when_fetched(self) -> None:
        """Release the parts' pages once every choice has its first token."""
        await until_fetched(self.engine, self.request_id)
        self.reader = None
        self.release()

    async def _release_when_ended(self) -> None:
        """Release the shards once the engine has ended the request, although its client may have stopped reading."""
        await until_ended(self.engine, self.request_id, lambda: self.has_output)
        if not self.aborted.is_set():  # an abort's own order of release includes choices that the front does not know
            self.release()


def with_task(params: SamplingParams, task: Task | None) -> SamplingParams:
    """Return the whole request's parameters with its task, if it has one."""
    if task is None:
        return params
    metadata = RequestMetadata(fetch=task) if isinstance(task, PageFetch) else RequestMetadata(remote=task)
    own = params.clone()
    own.extra_args = (params.extra_args or {}) | {KEY: metadata}
    return own


@contextmanager
def part_span(keywords: Mapping[str, Any], **attributes: Any) -> Iterator[dict[str, Any]]:
    """Trace a replica's part of a prompt in a span, if the prompt has a trace.

    Args:
        keywords: of AsyncLLM.generate.
        attributes: of the span, without "starling."; more of them may be put into the dict.
    """
    headers, began = keywords.get(TRACE_HEADERS), time.time_ns()
    try:
        yield attributes
    finally:
        if headers is not None and tracing.is_tracing_available():
            tracing.instrument_manual(
                "starling part",
                began,
                time.time_ns(),
                attributes={f"starling.{name}": value for name, value in attributes.items()},
                context=tracing.extract_trace_context(headers),
            )


CHECK_SECONDS = 0.2
"""Seconds between the front's looks at a request."""


async def until_fetched(engine: Any, request_id: str) -> None:
    """Wait until every choice of a request has its first token, or fetches nothing more."""
    prefilling = True
    while prefilling:
        await asyncio.sleep(CHECK_SECONDS)
        states = [request_state(engine, name) for name in engine_request_ids(engine, request_id)]
        prefilling = not states or any(state is None or state.is_prefilling for state in states)


async def until_ended(engine: Any, request_id: str, has_output: Callable[[], bool]) -> None:
    """Wait until the engine has ended a request.

    Args:
        has_output: whether the request has had an output: it may have ended before this is called.
    """
    seen = False
    while (names := engine_request_ids(engine, request_id)) or not (seen or has_output()):
        seen = seen or bool(names)
        await asyncio.sleep(CHECK_SECONDS)
    await asyncio.sleep(CHECK_SECONDS)  # the front aborts a request that ends at a stop string a little later
