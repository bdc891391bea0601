"""One replica's work for a prompt that is split over several: what it has cached, and the prefill of its part."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import msgspec
from vllm.sampling_params import SamplingParams

from starling.engine_ext.front.held_pages import HeldPages
from starling.engine_ext.front.state import front_state
from starling.engine_ext.requests import PLANNED
from starling.replicas.core_rpc import IS_PAUSED, RELEASE, REPLICA_STATE
from starling.scheduler.star.client_tokens import block_range
from starling.scheduler.star.plan import StarPlan, plan_to_wire
from starling.scheduler.star.request_metadata import KEY, PageSource, PromptPart, RequestMetadata
from starling.v1 import replica_pb2 as pb
from starling.vllm_compat.front import run_internal_request

HEALTH_CHECK_SECONDS = 5.0
"""How often a replica with a part under way, or to come, is called, to see whether it answers."""


class PartAborted(Exception):
    """A client has aborted a part of a prompt, by the request's id."""


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
    """

    request_id: str
    token_ids: Sequence[int]
    plan: StarPlan
    page_size: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def encoded_ids(self) -> msgspec.Raw:
        """The tokens as msgpack, encoded once for all replicas; none for an adapter.

        Pages that an adapter computed have keys that only its own requests make.
        """
        return msgspec.Raw(msgspec.msgpack.encode(self.token_ids if self.keywords.get("lora_request") is None else []))

    @cached_property
    def message(self) -> pb.PrefillPartRequest:
        """The prompt for other servers, made once for all of them: a million tokens take 40 ms.

        Raises:
            ValueError: a token or the priority is no number that a server takes.
        """
        return pb.PrefillPartRequest(
            prompt={
                "request_id": self.request_id,
                "token_ids": self.token_ids,
                "block_size": self.plan.block_size,
                "anchor_size": self.plan.anchor_size,
                "context_end": self.plan.context_end,
                "cache_salt": self.inputs.get("cache_salt"),
                "priority": self.keywords.get("priority", 0),
                "blocks": [{"start": start, "stop": stop} for start, stop in self.plan.documents],
            }
        )

    def part(self, first_block: int, stop_block: int) -> tuple[int, int]:
        """The positions [start, stop) of some star blocks, as far as they are whole pages."""
        start, stop = block_range(self.plan, first_block, stop_block)
        return start, max(stop // self.page_size * self.page_size, start)


@dataclass(frozen=True)
class HeldPart:
    """A part that is prefilled; its replica holds the pages, under a name."""

    name: str
    source: PageSource


class Replica(Protocol):
    """What a front needs of one replica for one prompt.

    Attributes:
        has_failed: whether the part that the replica holds is lost, or the replica does not answer.
    """

    @property
    def has_failed(self) -> bool: ...

    async def state(self) -> dict[str, Any]:
        """What replicas/replica_state.py says.

        Raises:
            ReplicaUnavailable: the replica does not answer.
        """

    async def prefill(self, first_block: int, stop_block: int) -> HeldPart | None:
        """Prefill star blocks and hold their pages; None where they have no whole page.

        Raises:
            ReplicaUnavailable: the replica does not answer.
            PartAborted: a client has aborted the part.
        """


async def while_answering(checks: Iterable[Any], work: Awaitable[Any], under_way: set[asyncio.Future]) -> Any:
    """The result of ``work``, as long as the replicas that it needs answer.

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
    """A replica that is one of this server's own engines.

    Args:
        rank: of the engine.
        prompt: the prompt, a part of which it may prefill.
        held: gets the names of the pages that the replica holds.
        under_way: has the parts that run, each of which ends with its task.
    """

    def __init__(
        self, engine: Any, rank: int, prompt: SplitPrompt, held: HeldPages, under_way: set[asyncio.Future]
    ) -> None:
        self.engine, self.rank, self.prompt, self.held, self.under_way = engine, rank, prompt, held, under_way
        self.front = front_state(engine)
        self.has_anchor = False

    @property
    def has_failed(self) -> bool:
        return self.front.replica_rpc.is_unresponsive(self.rank)

    async def call(self, name: str, *args: Any) -> Any:
        """Call a utility of the engine core."""
        return await self.front.replica_rpc.call(self.engine, self.rank, name, *args)

    async def check(self) -> None:
        """Find out whether the replica answers (raises ReplicaUnavailable)."""
        await self.call(RELEASE, [])

    async def is_paused(self) -> bool:
        """Whether an operator has paused the engine (raises ReplicaUnavailable if it does not answer)."""
        return bool(await self.call(IS_PAUSED))

    async def state(self) -> dict[str, Any]:
        plan, salt = plan_to_wire(self.prompt.plan), self.prompt.inputs.get("cache_salt")
        state: dict[str, Any] = await self.call(REPLICA_STATE, self.prompt.encoded_ids, plan, salt)
        self.has_anchor = state["has_anchor"]
        return state

    async def prefill(self, first_block: int, stop_block: int) -> HeldPart | None:
        """As Replica.prefill; the anchor is computed first, unless it is cached."""
        plan = self.prompt.plan
        start, stop = self.prompt.part(first_block, stop_block)
        if stop <= start:
            return None
        anchor = None
        if first_block and plan.anchor_size and not self.has_anchor:
            anchor = await self._run(0, plan.anchor_size, None)
        part = await self._run(start, stop, plan)
        if plan.shards and anchor:  # its pages would be held to the request's end, and nothing reads this copy
            await self.call(RELEASE, [anchor.name])
        return part

    async def _run(self, start: int, stop: int, plan: StarPlan | None) -> HeldPart:
        """Prefill the prompt's tokens up to ``stop``; the replica then holds the pages from ``start`` on.

        Args:
            plan: None to compute the anchor, which is dense.
        """
        name = self.held.new_name(self.rank)
        metadata = RequestMetadata(plan, part=PromptPart(name, start, self.prompt.plan.anchor_size))
        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args={KEY: metadata}
        )
        inputs = {key: value for key, value in self.prompt.inputs.items() if key not in ("prompt", PLANNED)}
        keywords = {key: value for key, value in self.prompt.keywords.items() if key in ("lora_request", "priority")}
        request = self.engine.input_processor.process_inputs(
            self.prompt.request_id,
            inputs | {"type": "token", "prompt_token_ids": list(self.prompt.token_ids[:stop])},
            params,
            supported_tasks=await self.engine.get_supported_tasks(),
            data_parallel_rank=self.rank,
            **keywords,
        )
        running = run_internal_request(self.engine, request, self.front.internal_ids)
        output = await while_answering([self.check], running, self.under_way)
        held = output.kv_transfer_params
        if held is None:
            raise PartAborted
        return HeldPart(held["name"], PageSource(**held["source"]))
