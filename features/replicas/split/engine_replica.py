"""One engine of the server, for one split prompt: what it has cached, the prefill of its part, the pages it holds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from starling.features.adapter.lora import adapter_fields
from starling.features.replicas.replica_calls import OPEN_SHARD, PING, RELEASE, REPLICA_STATE
from starling.features.replicas.split.split_state import ReplicaTimeout, Reservation, SplitState
from starling.scheduler.planning.decide import PLANNED
from starling.scheduler.planning.plan import StarPlan, block_range
from starling.scheduler.planning.request_metadata import KEY, PageSource, PromptPart, RequestMetadata
from starling.vllm_compat.front import run_internal_request

logger = init_logger("vllm.starling")

HEALTH_CHECK_SECONDS = 5.0
"""Seconds between calls of a replica with a part under way, or to come, to see whether it answers."""


class PartAborted(Exception):
    """A client has aborted a part of a prompt, by the request's id."""


@dataclass(frozen=True)
class HeldPart:
    """A part that is prefilled; its replica holds the pages.

    Attributes:
        name: under which the replica holds them.
        source: where they are.
        query_addresses: where each tensor-parallel rank takes queries, if the part is a shard.
    """

    name: str
    source: PageSource
    query_addresses: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt that is split over replicas.

    Attributes:
        request_id: as given to AsyncLLM.generate.
        token_ids: all of the prompt, as the engine core computes it.
        plan: of the whole prompt.
        page_size: tokens of a KV page.
        inputs: further entries of the engine input, such as ``cache_salt``.
        keywords: of AsyncLLM.generate, such as ``priority``.
        lora: the LoRA adapter (vLLM's LoRARequest) that it runs with, or None.
    """

    request_id: str
    token_ids: Sequence[int]
    plan: StarPlan
    page_size: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)
    lora: Any = None

    @cached_property
    def encoded_ids(self) -> msgspec.Raw:
        """The tokens as msgpack, encoded once for all replicas."""
        return msgspec.Raw(msgspec.msgpack.encode(self.token_ids))

    def part(self, first_block: int, stop_block: int) -> tuple[int, int]:
        """Return the positions [start, stop) of some star blocks, as far as they are whole pages."""
        start, stop = block_range(self.plan, first_block, stop_block)
        return start, max(stop // self.page_size * self.page_size, start)


async def while_answering(checks: Iterable[Any], work: Awaitable[Any], under_way: set[asyncio.Future]) -> Any:
    """Await ``work`` as long as the replicas that it needs answer, and return its result.

    Args:
        checks: functions without arguments, each of which calls a replica.
        under_way: has the work until it ends, which may be after this call is cancelled.

    Raises:
        ReplicaUnavailable: a replica does not answer.
    """
    running = asyncio.ensure_future(work)
    under_way.add(running)
    running.add_done_callback(under_way.discard)
    try:
        while not (await asyncio.wait({running}, timeout=HEALTH_CHECK_SECONDS))[0]:
            await asyncio.gather(*(check() for check in checks))
        return running.result()
    finally:
        running.cancel()
        await asyncio.wait({running})


class EngineReplica:
    """An engine of this server, for one prompt: it prefills a part, holds its pages, and can run the whole request.

    Args:
        state: what the front keeps of the replicas.
        engine: the AsyncLLM.
        rank: of the engine.
        prompt: the prompt, a part of which it may prefill.
        under_way: has the parts that run, each of which ends with its task.

    Attributes:
        reservation: the memory that this server reserves there for the prompt, or None.
    """

    def __init__(
        self,
        state: SplitState,
        engine: Any,
        rank: int,
        prompt: SplitPrompt,
        under_way: set[asyncio.Future],
    ) -> None:
        self.front, self.engine, self.rank, self.prompt, self.under_way = state, engine, rank, prompt, under_way
        self.rpc = state.rpc
        self.reservation: Reservation | None = None
        self.has_anchor = False
        self._names: list[str] = []  # under which the engine holds pages, or will once a part is complete

    @property
    def has_failed(self) -> bool:
        return self.rpc.is_unresponsive(self.rank)

    async def _call(self, name: str, *args: Any) -> Any:
        """Call a utility of the engine core (raises ReplicaUnavailable)."""
        return await self.rpc.call(self.engine, self.rank, name, *args)

    async def check(self) -> None:
        """Find out whether the engine answers (raises ReplicaUnavailable). A paused one does."""
        await self._call(PING)

    async def state(self) -> dict[str, Any]:
        """Return what replica_calls.py says of the prompt (raises ReplicaUnavailable)."""
        plan, salt = msgspec.to_builtins(self.prompt.plan), self.prompt.inputs.get("cache_salt")
        adapter = adapter_fields(self.prompt.lora)
        state: dict[str, Any] = await self._call(REPLICA_STATE, self.prompt.encoded_ids, plan, salt, adapter)
        self.has_anchor = state["has_anchor"]
        return state

    async def prefill(self, first_block: int, stop_block: int) -> HeldPart | None:
        """Prefill star blocks and hold their pages; None where they have no whole page.

        The anchor is computed first, unless it is cached.

        Raises:
            ReplicaUnavailable: the engine does not answer.
            PartAborted: a client has aborted the part.
        """
        plan = self.prompt.plan
        start, stop = self.prompt.part(first_block, stop_block)
        if stop <= start:
            return None
        anchor = None
        if first_block and plan.anchor_size and not self.has_anchor:
            anchor = await self._run(0, plan.anchor_size, None)
        part = await self._run(start, stop, plan)
        if not plan.shards or not first_block:
            return part
        if anchor:  # its pages would be held to the request's end, and nothing reads this copy
            await self._call(RELEASE, [anchor.name])
        return HeldPart(part.name, part.source, await self._call(OPEN_SHARD, part.name))

    async def _run(self, start: int, stop: int, plan: StarPlan | None) -> HeldPart:
        """Prefill the prompt's tokens up to ``stop``; the replica then holds the pages from ``start`` on.

        Args:
            plan: None to compute the anchor, which is dense.
        """
        # Another API server may have a request of that id; a name is sent with each query, so it has a bounded length.
        name = f"{self.prompt.request_id[:64]}#{uuid.uuid4().hex}"
        self._names.append(name)
        metadata = RequestMetadata(plan, part=PromptPart(name, start, self.prompt.plan.anchor_size))
        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args={KEY: metadata}
        )
        inputs = {key: value for key, value in self.prompt.inputs.items() if key not in ("prompt", PLANNED)}
        keywords = {key: value for key, value in self.prompt.keywords.items() if key == "priority"}
        request = self.engine.input_processor.process_inputs(
            self.prompt.request_id,
            inputs | {"type": "token", "prompt_token_ids": list(self.prompt.token_ids[:stop])},
            params,
            supported_tasks=await self.engine.get_supported_tasks(),
            data_parallel_rank=self.rank,
            lora_request=self.prompt.lora,
            **keywords,
        )
        running = run_internal_request(self.engine, request, self.front.internal_ids)
        output = await while_answering([self.check], running, self.under_way)
        held = output.kv_transfer_params
        if held is None:
            raise PartAborted
        return HeldPart(held["name"], PageSource(**held["source"]))

    async def settle(self) -> None:
        """Wait until a request that was ended before reads no more pages; raises nothing."""
        # Answered between two steps, after the abort that was sent before.
        await self._release_names([], patient=False)

    async def release(self) -> None:
        """Let the engine free what it holds for the prompt, and end the reservation there; raises nothing.

        The memory stays reserved until the engine has answered, or is dead.
        """
        names, self._names = self._names, []
        if names:
            await self._release_names(names, patient=True)
        if self.reservation is not None:
            self.reservation.release(self.rank)

    async def _release_names(self, names: list[str], patient: bool) -> None:
        """Let the engine release pages, and wait for its answer.

        Args:
            patient: wait for a replica that hangs until it is back, or its engine is dead.
        """
        if self.engine.errored:  # a dead engine holds nothing
            return
        request_id = self.prompt.request_id
        try:
            try:
                await self.rpc.call(self.engine, self.rank, RELEASE, names, always=True)
            except ReplicaTimeout as error:
                logger.error("%s: %s: it may hold this request's KV pages until it does", request_id, error)
                if patient and error.answer is not None:
                    await error.answer
        except Exception as error:
            logger.error("%s: replica %d may hold this request's KV pages: %s", request_id, self.rank, error)
