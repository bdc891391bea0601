"""One long prompt split over several replicas: its parts are prefilled there, then the whole request uses their KV.

With ``star_shards`` the KV stays on the replicas that computed it until the request ends. Without, the replica that
runs the request fetches it.

From its admission on, the request counts for vLLM's limits, once. It is known by its id, to Abort and to Drain, also
while the engine does not have it. Its preparation is a task of its own, which is cancelled once at most, however often
the client's task is: so each part is aborted before its pages are released.

Wraps AsyncLLM.generate, where HTTP and gRPC meet. Each replica with a part first computes the anchor, unless the anchor
is in its cache: all replicas do so at the same time, so fetching the anchor from another one could only be later. The
parts run under the request's own id and priority, so that an abort of that id ends them, and its progress counts them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from vllm.logger import init_logger
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from engine_ext.front.held_pages import HeldPages
from engine_ext.front.replica_rpc import ReplicaTimeout
from engine_ext.front.state import front_state
from engine_ext.metrics import front_metrics
from engine_ext.requests import PLANNED, PlannedPrompt
from replicas.core_rpc import OPEN_SHARD, RELEASE, REPLICA_STATE
from replicas.page_transfer import layout_mismatch
from scheduler.star.assignment import Assignment, ReplicaState, assign_blocks
from scheduler.star.kv_demand import KVDemand
from scheduler.star.plan import StarPlan
from scheduler.star.request_metadata import (
    KEY,
    LOST,
    PageFetch,
    PageSource,
    PromptPart,
    RemoteShards,
    RequestMetadata,
    Shard,
)
from vllm_compat.admission import Admission, RequestWithdrawn, admit, admitted_outputs, withdraw
from vllm_compat.front import abort_in_engine_cores, engine_request_ids, request_state, run_internal_request

logger = init_logger("vllm.starling")

HEALTH_CHECK_SECONDS = 5.0
"""How often a replica with a part under way, or to come, is called, to see whether it answers."""

FETCH_CHECK_SECONDS = 0.2
"""How often the front looks whether a request has its first tokens, so that other replicas can free their pages."""

RELEASE_SECONDS = 2.0
"""How long a request's end waits for its pages to be released."""

Generate = Callable[..., AsyncGenerator[Any, None]]
Task = PageFetch | RemoteShards


def generate_split(
    engine: Any, generate: Generate, prompt: Any, params: Any, request_id: str, keywords: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    """The outputs of a request: vLLM's own generator, unless its prompt is split over several replicas."""
    planned = planned_split(prompt, params, keywords)
    if planned is None:
        return generate(prompt, params, request_id, **keywords)
    return SplitPrefill(engine, prompt, request_id, keywords, planned).outputs(generate, params)


def planned_split(prompt: Any, params: Any, keywords: Mapping[str, Any]) -> PlannedPrompt | None:
    """The plan of a request whose prompt is split over several replicas; None: vLLM chooses one replica for it."""
    if not isinstance(prompt, Mapping) or prompt.get("type") != "token" or not isinstance(params, SamplingParams):
        return None
    if keywords.get("data_parallel_rank") is not None or params.skip_reading_prefix_cache:
        return None  # vLLM sets the latter for prompt_logprobs: one engine has to compute the whole prompt
    planned: PlannedPrompt | None = prompt.get(PLANNED)
    return planned if planned is not None and planned.plan is not None and planned.plan.replicas > 1 else None


def source_of(output: Any) -> PageSource:
    """Where the pages of a finished part are."""
    params = output.kv_transfer_params
    return PageSource(params["start"], params["pages"], params["addresses"])


class ShardLost(RuntimeError):
    """A request could not go on, because a replica that holds a part of its KV can't be reached."""


class SplitPrefill:
    """One request whose prompt is split over the replicas."""

    def __init__(
        self, engine: Any, prompt: Mapping[str, Any], request_id: str, keywords: dict[str, Any], planned: PlannedPrompt
    ) -> None:
        assert planned.plan is not None
        assert planned.token_ids is not None
        self.engine = engine
        self.state = front_state(engine)
        self.prompt = prompt
        self.token_ids: Sequence[int] = planned.token_ids
        self.request_id = request_id
        self.keywords = keywords
        self.plan: StarPlan = planned.plan
        self.page_size: int = self.state.planner.page_size or 1
        self.anchor_work = self.plan.anchor_size / self.plan.block_size
        self.held = HeldPages(engine, self.state.replica_rpc, request_id)
        self.capacity: dict[int, int] = {}  # replica -> pages of its memory
        self.admission: Admission  # made before the request can be aborted
        self.aborted = asyncio.Event()
        self.aborted_ids: list[str] = []  # the engine's own, of what it had at each abort
        self.tasks: list[asyncio.Task] = []  # the request's end cancels them
        self.working: set[asyncio.Future] = set()  # parts and the reservation under way, which end with their tasks

    def abort(self) -> None:
        """End the request, unless the engine has it: then the engine ends it."""
        self.aborted.set()
        self.aborted_ids += engine_request_ids(self.engine, self.request_id)
        withdraw(self.engine, self.admission)

    async def outputs(self, generate: Generate, params: SamplingParams) -> AsyncGenerator[Any, None]:
        """Prefill the parts, then yield what the whole request yields on the replica of the first part.

        Raises:
            QueueOverflowError, MaxQueuedTokensError: the server's limits are reached; raised before anything is done.
            ReplicaTimeout: no replica answers, or, with shards, one with a part does not.
            ShardLost: a replica that holds a part of the KV was lost.
        """
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
                yield aborted_output(self.request_id, self.token_ids, params.n)
                return
            rank, task = prepared
            self.held.home = None if task is None else rank
            if isinstance(task, RemoteShards):
                front_metrics().shard_requests.inc()
            else:
                self._start(self._release_when_fetched())
            keywords = self.keywords | {"data_parallel_rank": rank}
            whole = generate(self.prompt, with_task(params, task), self.request_id, **keywords)
            async with aclosing(admitted_outputs(whole, admission)) as outputs:
                async for output in outputs:
                    lost = (output.kv_transfer_params or {}).get(LOST)
                    if lost is not None:
                        raise ShardLost(f"the replica that holds a part of the prompt's KV is unavailable: {lost}")
                    has_ended = output.finished
                    yield output
        except RequestWithdrawn:  # aborted while it was handed over
            yield aborted_output(self.request_id, self.token_ids, params.n)
        finally:
            withdraw(self.engine, admission)
            self.state.split_requests.remove(self)
            await self._end(None if has_ended else admission.engine_request_id)

    async def _prepare(self, params: SamplingParams) -> tuple[int, Task | None] | None:
        """Prefill the parts; returns the replica of the whole request, and what that does with others' pages.

        None: a client has aborted the parts, by the request's id.
        """
        started = time.monotonic()
        replicas = await self._replica_states()
        ranks, states = list(replicas), list(replicas.values())
        by_index = assign_blocks(self.plan.num_star_blocks, self.anchor_work, states, self.plan.replicas)
        assignments = [replace(assignment, replica=ranks[assignment.replica]) for assignment in by_index]
        first = assignments[0].replica
        if len(assignments) == 1:
            return first, None
        wanted = self._demand.pages_of(assignments, params)
        try:
            reserving = self.held.reserve(self.state.reservations, wanted, self.capacity, self.plan.shards)
            await self._while_answering(wanted, reserving)
            ended = await self._prefill(assignments, replicas)
        except ReplicaTimeout as timeout:
            if self.plan.shards:  # one replica may not have the memory
                raise
            rank = next((rank for rank in ranks if not self.state.replica_rpc.is_unresponsive(rank)), first)
            logger.error("%s: %s; replica %d computes the whole prompt", self.request_id, timeout, rank)
            return rank, None
        if any(output and output.kv_transfer_params is None for output in ended):
            return None
        task = await self._task(assignments, ended)
        blocks_of = {each.replica: each.stop - each.first for each in assignments}
        front_metrics().count_split(blocks_of, time.monotonic() - started)
        return first, task

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
        while running := {task for task in self.tasks if not task.done()} | self.working:
            await asyncio.wait(running)
        for task in self.tasks:
            if not task.cancelled():
                task.exception()  # the client got it, unless it has left
        if engine_request_id is not None:
            # vLLM forgets to abort a request whose client leaves while it is handed to the engine.
            await self.engine.abort(engine_request_id, internal=True)
        if self.aborted_ids:
            await abort_in_engine_cores(self.engine, self.aborted_ids)
        await self.held.release()

    @property
    def _demand(self) -> KVDemand:
        return KVDemand(self.plan, self.page_size, self.capacity)

    async def _call(self, rank: int, name: str, *args: Any, always: bool = False) -> Any:
        return await self.state.replica_rpc.call(self.engine, rank, name, *args, always=always)

    async def _task(self, assignments: Sequence[Assignment], ended: Sequence[Any]) -> Task | None:
        """What the whole request does with the pages of the finished parts."""
        if not self.plan.shards:
            sources = tuple(source_of(output) for output in ended[1:] if output)
            return PageFetch(sources) if sources else None
        parts = [
            (assignment.replica, output.kv_transfer_params)
            for assignment, output in zip(assignments, ended, strict=True)
            if output
        ]
        opened = (self._call(rank, OPEN_SHARD, part["name"]) for rank, part in parts[1:])
        shards = tuple(
            Shard(part["name"], part["start"], len(part["pages"]) * self.page_size, addresses)
            for (_, part), addresses in zip(parts[1:], await asyncio.gather(*opened), strict=True)
        )
        return RemoteShards(parts[0][1]["name"], shards) if shards else None

    async def _replica_states(self) -> dict[int, ReplicaState]:
        """What each replica that answers has cached of the prompt, and how busy it is, by rank.

        Raises:
            ReplicaTimeout: none answers.
            ValueError: the pages of two of them have different layouts.
        """
        # Pages that an adapter computed have keys that only its own requests make.
        token_ids = self.token_ids if self.keywords.get("lora_request") is None else []
        encoded = msgspec.Raw(msgspec.msgpack.encode(token_ids))  # once for all replicas
        number = self.engine.vllm_config.parallel_config.data_parallel_size
        salt, plan = self.prompt.get("cache_salt"), self.plan.to_wire()
        calls = (self._call(rank, REPLICA_STATE, encoded, plan, salt) for rank in range(number))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ReplicaTimeout):
                raise answer
        states = {rank: answer for rank, answer in enumerate(answers) if not isinstance(answer, BaseException)}
        if not states:
            raise ReplicaTimeout(0, self.state.replica_rpc.timeout)
        first = next(iter(states))
        for rank, state in states.items():
            reason = layout_mismatch(states[first]["layout"], state["layout"])
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

    async def _prefill(self, assignments: Sequence[Assignment], replicas: Mapping[int, ReplicaState]) -> list[Any]:
        """Prefill all parts; returns their outputs, in the order of the assignments."""
        parts = [asyncio.create_task(self._part(each, replicas[each.replica])) for each in assignments]
        try:
            return await asyncio.gather(*parts)
        except BaseException:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)  # the first one's error is raised
            raise

    async def _part(self, assignment: Assignment, replica: ReplicaState) -> Any:
        """Prefill the blocks of an assignment; returns the output, None where the part has no whole page."""
        plan, rank = self.plan, assignment.replica
        start = assignment.first * plan.block_size
        stop = min(assignment.stop * plan.block_size, plan.context_end) // self.page_size * self.page_size
        if stop <= start:
            return None
        if assignment.first and plan.anchor_size and not replica.has_anchor:
            output = await self._run(rank, 0, plan.anchor_size, None)
            if output.kv_transfer_params is None:
                return output
        part = await self._run(rank, start, stop, plan)
        *anchors, _ = self.held.names[rank]
        if plan.shards and anchors:  # the pages would be held to the request's end, and nothing reads this copy
            await self._call(rank, RELEASE, anchors)
        return part

    async def _run(self, rank: int, start: int, stop: int, plan: StarPlan | None) -> Any:
        """Prefill the prompt's tokens up to ``stop`` on a replica, which then holds the pages from ``start`` on.

        Args:
            plan: None to compute the anchor, which is dense.
        """
        name = self.held.new_name(rank)
        metadata = RequestMetadata(plan, part=PromptPart(name, start, self.plan.anchor_size))
        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args={KEY: metadata}
        )
        prompt = {key: value for key, value in self.prompt.items() if key not in ("prompt", PLANNED)}
        keywords = {key: self.keywords[key] for key in ("lora_request", "priority") if key in self.keywords}
        request = self.engine.input_processor.process_inputs(
            self.request_id,
            prompt | {"prompt_token_ids": list(self.token_ids[:stop])},
            params,
            supported_tasks=await self.engine.get_supported_tasks(),
            data_parallel_rank=rank,
            **keywords,
        )
        return await self._while_answering([rank], run_internal_request(self.engine, request, self.state.internal_ids))

    async def _while_answering(self, ranks: Iterable[int], work: Any) -> Any:
        """The result of ``work``, as long as these replicas answer.

        Raises:
            ReplicaTimeout: one does not.
        """
        running = asyncio.ensure_future(work)
        self.working.add(running)
        running.add_done_callback(self.working.discard)
        try:
            while not (await asyncio.wait({running}, timeout=HEALTH_CHECK_SECONDS))[0]:
                await asyncio.gather(*(self._call(rank, RELEASE, []) for rank in ranks))
            return running.result()
        finally:
            running.cancel()
            await asyncio.wait({running})

    async def _release_when_fetched(self) -> None:
        """Release the parts' pages once every choice has its first token.

        The output of a response that is not streamed comes at its end alone, so the front's own state is polled.
        """
        prefilling = True
        while prefilling:
            await asyncio.sleep(FETCH_CHECK_SECONDS)
            names = engine_request_ids(self.engine, self.request_id)
            states = [request_state(self.engine, name) for name in names]
            prefilling = not states or any(state is None or state.is_prefilling for state in states)
        self.held.home = None
        self.held.release()


def aborted_output(request_id: str, token_ids: Sequence[int], num_choices: int) -> RequestOutput:
    """The last output of a request that is aborted before the engine gets it."""
    choices = [
        CompletionOutput(index, "", [], cumulative_logprob=None, logprobs=None, finish_reason="abort")
        for index in range(num_choices)
    ]
    return RequestOutput(request_id, None, list(token_ids), None, choices, finished=True, num_cached_tokens=0)


def with_task(params: SamplingParams, task: Task | None) -> SamplingParams:
    """The whole request's parameters, with what it does with the other replicas' pages."""
    if task is None:
        return params
    metadata = RequestMetadata(fetch=task) if isinstance(task, PageFetch) else RequestMetadata(remote=task)
    own = params.clone()
    own.extra_args = (params.extra_args or {}) | {KEY: metadata}
    return own
