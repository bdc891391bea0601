"""One long prompt over several replicas: splits it, sends out the parts, lets the whole request run on what they made.

With ``star_shards`` the KV stays on the replicas that made it until the request ends. Else the one that runs the
request fetches it.

Wraps AsyncLLM.generate, where HTTP and gRPC meet. Each replica with a part first computes the anchor where it does not
have it cached: all do so at the same time, so fetching it from another one could only be later. The parts run under the
request's own id and priority, so that an abort of that id ends them and a look at its progress finds them.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from engine_ext import compat
from engine_ext.kv_room import KVRoom, Promise, rooms
from engine_ext.metrics import front_metrics
from engine_ext.per_engine import per_engine
from engine_ext.requests import PlannedPrompt, star_requests
from scheduler.core_utilities import LET_GO, OPEN_SHARD, REPLICA_STATE
from scheduler.page_mover import mismatch
from scheduler.share import LOST, SHARE_KEY, Attend, Part, Pull, Shard, Share, Source
from scheduler.silence import silence_seconds
from scheduler.spread import Replica, Run, spread_blocks

logger = init_logger("vllm.starling")

LOOK_SECONDS = 5.0
"""How often a replica with a part under way is asked whether it is there."""

FETCH_CHECK_SECONDS = 0.2
"""How often the front looks whether a request has its first tokens, and others may free their pages."""

RELEASE_SECONDS = 2.0
"""How long a request's end waits for its pages to be let go."""

Generate = Callable[..., AsyncGenerator[Any, None]]


def spread(
    engine: Any, generate: Generate, prompt: Any, params: Any, request_id: str, keywords: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    """The outputs of a request: vLLM's own generator, unless its prompt goes over several replicas."""
    planned = plan_to_spread(engine.input_processor, prompt, params, keywords)
    if planned is None:
        return generate(prompt, params, request_id, **keywords)
    return SpreadPrompt(engine, prompt, request_id, keywords, planned).outputs(generate, params)


def plan_to_spread(input_processor: Any, prompt: Any, params: Any, keywords: Mapping[str, Any]) -> PlannedPrompt | None:
    """The plan of a request whose prompt goes over several replicas; None: it is routed as vLLM does."""
    if not isinstance(prompt, Mapping) or prompt.get("type") != "token" or not isinstance(params, SamplingParams):
        return None
    if keywords.get("data_parallel_rank") is not None or params.skip_reading_prefix_cache:
        return None  # the latter is how vLLM computes prompt_logprobs: the whole prompt in one place
    token_ids = prompt["prompt_token_ids"]
    planned = star_requests(input_processor).plan(params.extra_args, len(token_ids), token_ids)
    return planned if planned.plan is not None and planned.plan.replicas > 1 else None


under_way = per_engine("under_way", set[str])
"""Ids of the requests whose prompts go over several replicas now.

Between its parts and the whole, such a request is none that the engine knows.
"""

releases = per_engine("releases", set[asyncio.Future])
"""What ended requests still let go of."""

_open_questions = per_engine("open_questions", dict[int, asyncio.Future])


def source_of(output: Any) -> Source:
    """Where the pages are that a part has made."""
    told = output.kv_transfer_params
    return Source(told["start"], told["pages"], told["addresses"])


class ShardLost(RuntimeError):
    """A request could not go on, for a replica that holds a part of its KV."""


class ReplicaSilent(Exception):
    """A replica does not answer: it hangs, or its host can't be reached."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"replica {rank} has not answered for {silence_seconds():g} s")


def silent_replicas(engine: Any) -> dict[int, asyncio.Future]:
    """The question that each silent replica of an engine has left open."""
    silent = _open_questions(engine)
    for rank in [rank for rank, question in silent.items() if question.done()]:
        del silent[rank]
    return silent


async def ask_replica(engine: Any, rank: int, name: str, *args: Any, in_any_case: bool = False) -> Any:
    """Call a utility in one replica, between two of its steps.

    Args:
        in_any_case: call it also where an older question is open: it is answered once the replica is back.

    Raises:
        ReplicaSilent: it does not answer, or has an older question open.
        EngineDeadError: the server's engines are dead.
    """
    if rank in silent_replicas(engine) and not in_any_case:
        raise ReplicaSilent(rank)
    question = asyncio.ensure_future(compat.call_replica(engine, rank, name, *args))
    asked, silence = time.monotonic(), silence_seconds()  # it answers between two steps
    while not (await asyncio.wait({question}, timeout=compat.DEATH_CHECK_SECONDS))[0]:
        if engine.errored:
            question.cancel()
            raise engine.dead_error
        if time.monotonic() - asked > silence:
            silent_replicas(engine)[rank] = question
            raise ReplicaSilent(rank)
    return question.result()


class SpreadPrompt:
    """One request on its way over the replicas."""

    def __init__(
        self, engine: Any, prompt: Mapping[str, Any], request_id: str, keywords: dict[str, Any], planned: PlannedPrompt
    ) -> None:
        assert planned.plan is not None
        assert planned.token_ids is not None
        plan = planned.plan
        self.engine = engine
        self.prompt = prompt  # as the client gave it: the whole request, too, is planned as it comes to the engine
        self.token_ids: Sequence[int] = planned.token_ids
        self.request_id = request_id
        self.keywords = keywords
        self.plan = plan
        self.page: int = star_requests(engine.input_processor).page or 1
        self.anchor_work = plan.anchor_size / plan.block_size
        self.names: dict[int, list[str]] = {}
        self.home: int | None = None
        self.pages: dict[int, int] = {}
        self.promise: Promise | None = None

    async def outputs(self, generate: Generate, params: SamplingParams) -> AsyncGenerator[Any, None]:
        """Prefill the parts, then yield what the whole request yields on the replica of the first one."""
        started = time.monotonic()
        fetching: asyncio.Task | None = None
        self.engine.check_admission(params.n, self.request_id)  # vLLM itself asks once all parts are done
        under_way(self.engine).add(self.request_id)
        try:
            replicas = await self._replicas()
            ranks, states = list(replicas), list(replicas.values())
            split = spread_blocks(self.plan.num_star_blocks, self.anchor_work, states, self.plan.replicas)
            runs = [replace(run, replica=ranks[run.replica]) for run in split]
            rank, task = runs[0].replica, None
            if len(runs) > 1:
                wanted = self.room.of_runs(runs, params)
                self.promise = await rooms(self.engine).take(wanted, self.pages, self.plan.shards)
                try:
                    ended = await self._prefill(runs, replicas)
                except ReplicaSilent as silent:
                    if self.plan.shards:  # one replica may not have the memory
                        raise
                    rank = next((rank for rank in ranks if rank not in silent_replicas(self.engine)), rank)
                    logger.error("%s: %s; replica %d computes the whole prompt", self.request_id, silent, rank)
                else:
                    aborted = next((output for output in ended if output and output.kv_transfer_params is None), None)
                    if aborted is not None:  # by the client, under the request's id
                        yield aborted
                        return
                    task = await self._task(runs, ended)
                    blocks_of = {run.replica: run.stop - run.first for run in runs}
                    front_metrics().spread(blocks_of, time.monotonic() - started)
            own, keywords = self._with_task(params, task), self.keywords | {"data_parallel_rank": rank}
            if isinstance(task, Attend):
                front_metrics().shard_requests.inc()
                self.home = rank
            else:
                fetching = asyncio.create_task(self._let_go_when_fetched())
            async with aclosing(generate(self.prompt, own, self.request_id, **keywords)) as outputs:
                async for output in outputs:
                    lost = (output.kv_transfer_params or {}).get(LOST)
                    if lost is not None:
                        raise ShardLost(f"a replica holds a part of the prompt's KV, and it can't be used: {lost}")
                    yield output
        finally:
            under_way(self.engine).discard(self.request_id)
            if fetching is not None:
                fetching.cancel()
            await self._end()

    @property
    def room(self) -> KVRoom:
        return KVRoom(self.plan, self.page, self.pages)

    async def _end(self) -> None:
        """Let go of everything: at once where replicas answer, and without keeping the client where one does not."""
        release = asyncio.ensure_future(self._let_go())
        releases(self.engine).add(release)
        release.add_done_callback(releases(self.engine).discard)
        await asyncio.wait({release}, timeout=RELEASE_SECONDS)

    async def _task(self, runs: Sequence[Run], ended: Sequence[Any]) -> Pull | Attend | None:
        """What the request does with its parts' outputs."""
        if not self.plan.shards:
            sources = tuple(source_of(output) for output in ended[1:] if output)
            return Pull(sources) if sources else None
        parts = [(run.replica, output.kv_transfer_params) for run, output in zip(runs, ended, strict=True) if output]
        opened = (ask_replica(self.engine, rank, OPEN_SHARD, part["name"]) for rank, part in parts[1:])
        shards = tuple(
            Shard(part["name"], part["start"], len(part["pages"]) * self.page, addresses)
            for (_, part), addresses in zip(parts[1:], await asyncio.gather(*opened), strict=True)
        )
        return Attend(parts[0][1]["name"], shards) if shards else None

    async def _replicas(self) -> dict[int, Replica]:
        """What each replica that answers has of the prompt, and how busy it is, by rank.

        Raises:
            ReplicaSilent: none answers.
            ValueError: the pages of two of them differ.
        """
        known = self.keywords.get("lora_request") is None  # an adapter's pages have keys that only its requests make
        asked = list(self.token_ids) if known else []
        number = self.engine.vllm_config.parallel_config.data_parallel_size
        salt, plan = self.prompt.get("cache_salt"), self.plan.to_wire()
        calls = (ask_replica(self.engine, rank, REPLICA_STATE, asked, plan, salt) for rank in range(number))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ReplicaSilent):
                raise answer
        told = {rank: answer for rank, answer in enumerate(answers) if not isinstance(answer, BaseException)}
        if not told:
            raise ReplicaSilent(0)
        first = next(iter(told))
        for rank, state in told.items():
            reason = mismatch(told[first]["layout"], state["layout"])
            if reason is not None:
                raise ValueError(f"replicas {first} and {rank} can't share a prompt: {reason}")
        self.pages = {rank: state["pages"] for rank, state in told.items()}
        return {
            rank: Replica(
                frozenset(state["cached"]),
                state["has_anchor"],
                state["queued_tokens"] / self.plan.block_size,
                self.room.blocks(rank) if self.plan.shards else math.inf,
            )
            for rank, state in told.items()
        }

    async def _prefill(self, runs: Sequence[Run], replicas: Mapping[int, Replica]) -> list[Any]:
        """Let all parts be computed; returns their outputs, by run."""
        parts = [asyncio.create_task(self._part(run, replicas[run.replica])) for run in runs]
        try:
            return await asyncio.gather(*parts)
        except BaseException:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)  # the first one's error is raised
            raise

    async def _part(self, run: Run, replica: Replica) -> Any:
        """Prefill one run; None where it has no whole page to give."""
        plan = self.plan
        start = run.first * plan.block_size
        stop = min(run.stop * plan.block_size, plan.context_end) // self.page * self.page
        if stop <= start:
            return None
        if run.first and plan.anchor_size and not replica.has_anchor:
            output = await self._run(run.replica, 0, plan.anchor_size, None)
            if output.kv_transfer_params is None:
                return output
        part = await self._run(run.replica, start, stop, plan.to_wire())
        *anchors, _ = self.names[run.replica]
        if self.plan.shards and anchors:  # held to the end otherwise, and nobody needs this copy
            await ask_replica(self.engine, run.replica, LET_GO, anchors)
        return part

    async def _run(self, rank: int, start: int, stop: int, plan: list[int] | None) -> Any:
        """Prefill the prompt's tokens up to ``stop`` on a replica, those from ``start`` on to be held there."""
        name = f"{self.request_id}#{uuid.uuid4().hex}"  # another API server may have a request of that id
        self.names.setdefault(rank, []).append(name)
        share = Share(plan, Part(name, start, self.plan.anchor_size))
        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args={SHARE_KEY: share}
        )
        prompt = {key: value for key, value in self.prompt.items() if key != "prompt"}
        keywords = {key: self.keywords[key] for key in ("lora_request", "priority") if key in self.keywords}
        request = self.engine.input_processor.process_inputs(
            self.request_id,
            prompt | {"prompt_token_ids": list(self.token_ids[:stop])},
            params,
            supported_tasks=await self.engine.get_supported_tasks(),
            data_parallel_rank=rank,
            **keywords,
        )
        running = asyncio.create_task(compat.run_unseen(self.engine, request))
        try:
            while not (await asyncio.wait({running}, timeout=LOOK_SECONDS))[0]:
                await ask_replica(self.engine, rank, LET_GO, [])
            return running.result()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)  # its error, if any, is raised above

    def _with_task(self, params: SamplingParams, task: Pull | Attend | None) -> SamplingParams:
        """The request's parameters, with what it does about the others' pages."""
        if task is None:
            return params
        own = params.clone()
        own.extra_args = (params.extra_args or {}) | {SHARE_KEY: Share(None, task)}
        return own

    async def _let_go_when_fetched(self) -> None:
        """Once every choice has its first token: a response that is not streamed tells nothing before its last."""
        prefilling = True
        while prefilling:
            await asyncio.sleep(FETCH_CHECK_SECONDS)
            names = compat.engine_request_ids(self.engine, self.request_id)
            states = [compat.front_request(self.engine, name) for name in names]
            prefilling = not states or any(state is None or state.is_prefilling for state in states)
        await self._let_go()

    async def _let_go(self) -> None:
        """Free what replicas hold for this prompt; a dead engine holds nothing."""
        names, self.names = self.names, {}
        if names and not self.engine.errored:
            if self.home is not None:
                # Answered between two steps, after the abort that was sent before: nothing attends to the pages then.
                await self._let_go_of({self.home: []})
            await self._let_go_of(names)
        if self.promise is not None:
            self.promise.give_back()

    async def _let_go_of(self, names: Mapping[int, list[str]]) -> None:
        calls = (ask_replica(self.engine, rank, LET_GO, of_rank, in_any_case=True) for rank, of_rank in names.items())
        for error in await asyncio.gather(*calls, return_exceptions=True):
            if error is not None:
                logger.error("%s: pages may stay held: %s", self.request_id, error)
