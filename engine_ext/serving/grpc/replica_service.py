"""starling.v1.ReplicaService: prefills parts of the prompts of other servers, and holds their pages meanwhile.

One call is one part of one prompt. It is also the lease of the pages: they are held until the caller sends a release.
If the call ends without one (the caller has died, or the network between the two), the caller may still read the pages
for some time, until it has noticed. Therefore they are held for ``hold_seconds`` then. A caller that stands still does
not notice: it asks whether the pages are held, and begins to read within ``fetch_seconds`` of its question, or not at
all.
"""

from __future__ import annotations

import asyncio
from itertools import accumulate, pairwise
from typing import Any

import grpc
import msgspec
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.logger import init_logger

from starling.engine_ext.front.front_state import front_state, split_state
from starling.engine_ext.front.requests import RequestPlanner
from starling.engine_ext.serving.grpc.arrivals import arriving
from starling.engine_ext.serving.grpc.messages import abort
from starling.features.adapter.front import Adapter
from starling.features.replicas.split.engine_replica import HEALTH_CHECK_SECONDS, EngineReplica, SplitPrompt
from starling.features.replicas.split.peers import Identity, hold_seconds
from starling.features.replicas.split.replica import HeldPart, PartAborted
from starling.features.replicas.split.replica_rpc import ReplicaUnavailable
from starling.features.replicas.split.split_metrics import split_metrics
from starling.scheduler.star.documents import lay_out
from starling.scheduler.star.plan import StarPlan
from starling.v1 import replica_pb2 as pb
from starling.v1 import replica_pb2_grpc
from starling.vllm_compat.admission_limits import Admission, admit, withdraw

logger = init_logger("vllm.starling")

MESSAGE_SECONDS = 60.0
"""How long the caller may take to send a message."""


class ReplicaServicer(replica_pb2_grpc.ReplicaServiceServicer):
    """Serves the peers of one server.

    Args:
        engine: the AsyncLLM, which has one engine.
        identity: of this server.
    """

    def __init__(self, engine: Any, identity: Identity) -> None:
        self.engine, self.identity = engine, identity

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        properties = dict(self.identity.properties)
        if (changed_by := split_state(self.engine).weights_changed_by) is not None:
            properties["weights"] = f"changed by {changed_by}"
        return pb.DescribeResponse(name=self.identity.name, properties=properties)

    async def PrefillPart(self, _: Any, context: Any) -> None:
        try:
            first = await arriving(context.read(), MESSAGE_SECONDS)
            if first is grpc.aio.EOF or first.WhichOneof("step") != "prompt":
                raise VLLMValidationError("the first message has to be the prompt", parameter="prompt")
            prompt = split_prompt(first.prompt, front_state(self.engine).planner)
            await Lease(self.engine, prompt).serve(context)
        except ReplicaUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await abort(context, error, "prompt")


def split_prompt(message: pb.Prompt, planner: RequestPlanner) -> SplitPrompt:
    """The prompt of a message.

    Raises:
        VLLMValidationError: its plan is none that a server makes, or one that this server can't compute.
    """
    page_size = planner.page_size or 1
    documents = tuple((block.start, block.stop) for block in message.blocks)
    sizes = (message.block_size, message.anchor_size, 0, message.context_end, len(message.token_ids))
    plan = StarPlan(*sizes, replicas=2, documents=documents, adapter=message.adapter)
    if not is_valid(plan, page_size):
        reason = f"a peer sent a plan that does not fit its prompt, or KV pages of {page_size} tokens: {plan}"
        raise VLLMValidationError(reason, parameter="prompt")
    if documents and planner.engine.document_refusals:
        reason = f"a peer sent a prompt of documents: {'; '.join(planner.engine.document_refusals)}"
        raise VLLMValidationError(reason, parameter="prompt")
    own = planner.part(Adapter)
    if message.adapter and (own is None or own.adapter.digest != message.adapter):
        reason = f"a peer sent a prompt with the adapter {message.adapter}, which is not this server's"
        raise VLLMValidationError(reason, parameter="prompt")
    inputs = {"cache_salt": message.cache_salt} if message.HasField("cache_salt") else {}
    keywords, lora = {"priority": message.priority}, planner.lora_of(plan, None)
    return SplitPrompt(message.request_id, list(message.token_ids), plan, page_size, inputs, keywords, lora)


def is_valid(plan: StarPlan, page_size: int) -> bool:
    """Whether a plan is one that a server makes for its prompt."""
    sizes = (plan.block_size, plan.anchor_size)
    if not 0 < plan.context_end < plan.num_prompt_tokens or not plan.block_size or any(s % page_size for s in sizes):
        return False
    if not plan.documents:
        return plan.anchor_size <= plan.block_size
    lengths = [end - start for start, end in plan.documents]
    return (
        len(lengths) > 1
        and all(0 < length <= plan.block_size for length in lengths)
        and plan.anchor_size <= lengths[0]
        and lay_out(list(pairwise([0, *accumulate(lengths)])), page_size) == (plan.documents, plan.context_end)
    )


class Lease:
    """One call of a peer: its prompt, and the pages that are held for it."""

    def __init__(self, engine: Any, prompt: SplitPrompt) -> None:
        self.engine, self.prompt, self.front = engine, prompt, split_state(engine)
        self.under_way: set[asyncio.Future] = set()
        self.replica = EngineReplica(self.front, engine, 0, prompt, self.under_way, fails_if_paused=True)
        self.admission: Admission | None = None
        self.prefilling: asyncio.Task | None = None
        self.request_id, self.is_aborted = prompt.request_id, False
        self.capacity = 0  # pages of the engine's memory
        self.is_held = False  # the caller knows where the pages are

    async def serve(self, context: Any) -> None:
        """Answer the caller's messages until it sends a release, or the call breaks."""
        is_released = False
        self.front.leases.add(self)
        try:
            checks = self.replica.check(), self.replica.check_weights()
            *_, state = await asyncio.gather(*checks, self.replica.state())  # between the same two steps
            self.capacity = state["pages"]
            await context.write(pb.PrefillPartResponse(state=prompt_state(state)))
            request = await context.read()
            if not is_end(request):
                request = await self._prefill(context, request)
            is_released = request is not grpc.aio.EOF
        finally:
            self.front.leases.remove(self)
            releasing = asyncio.ensure_future(self._end(broken=not is_released))
            self.front.releases.add(releasing)
            releasing.add_done_callback(self.front.releases.discard)
        await asyncio.shield(releasing)

    async def _prefill(self, context: Any, request: pb.PrefillPartRequest) -> Any:
        """Prefill a part, and wait until the caller needs its pages no more.

        Returns:
            What came after the part: a release; or grpc.aio.EOF, which a broken call can look like too.
        """
        first, stop = request.part.first_block, request.part.stop_block
        if request.WhichOneof("step") != "part" or not first < stop <= len(self.prompt.plan.starts):
            reason = f"blocks {first} to {stop} are no part of {len(self.prompt.plan.starts)} blocks"
            raise VLLMValidationError(reason, parameter="part")
        start, end = self.prompt.part(first, stop)
        self.admission = admit(self.engine, self.prompt.request_id, 1, end - start)
        self._reserve(end - start + (self.prompt.plan.anchor_size if first else 0))
        self.prefilling = asyncio.ensure_future(self.replica.prefill(first, stop))
        closing = asyncio.ensure_future(context.read())
        try:
            ends = {self.prefilling, closing}
            while not (await asyncio.wait(ends, timeout=HEALTH_CHECK_SECONDS, return_when=asyncio.FIRST_COMPLETED))[0]:
                await self.replica.check()
                await context.write(pb.PrefillPartResponse(alive=pb.Alive()))
            if not closing.done():
                response = self._response()
                await self.replica.check_weights()  # those that the part was computed with
                self.is_held = True
                await context.write(response)
                split_metrics().peer_parts.inc()
            while not is_end(message := await closing):
                if message.WhichOneof("step") == "renew" and self.is_held:
                    await context.write(pb.PrefillPartResponse(renewed=pb.Renewed()))
                closing = asyncio.ensure_future(context.read())
            return message
        finally:
            closing.cancel()

    def abort(self) -> None:
        """Note that the part was aborted here, by its request's id; the engine ends it."""
        self.is_aborted = True

    def _response(self) -> pb.PrefillPartResponse:
        """The response to the part, which has ended (raises what the part raised)."""
        assert self.prefilling is not None
        try:
            response = response_of(self.prefilling.result())
        except PartAborted:
            if not self.is_aborted:
                raise ReplicaUnavailable("the engine has ended the part: it shuts down, or is paused") from None
        # An abort that comes as the anchor or the part is complete has not ended it.
        return pb.PrefillPartResponse(aborted=pb.PartAborted()) if self.is_aborted else response

    def _reserve(self, num_tokens: int) -> None:
        """Reserve the memory of a part, or refuse the part: its caller holds memory that others here may wait for."""
        num_pages = min(num_tokens // self.prompt.page_size + 1, self.capacity)
        self.replica.reservation = self.front.reservations.reserve_at_once({0: num_pages}, {0: self.capacity})
        if self.replica.reservation is None:
            raise QueueOverflowError

    async def _end(self, broken: bool) -> None:
        """End the part, and release its pages: at once, or, if the call broke, when the caller has noticed."""
        if self.prefilling is not None:
            self.prefilling.cancel()
            while running := {task for task in (self.prefilling, *self.under_way) if not task.done()}:
                await asyncio.wait(running)
            if not self.prefilling.cancelled():
                self.prefilling.exception()  # the caller got it, unless it has left
        if broken and self.is_held:
            seconds = hold_seconds(self.front.rpc.timeout)
            name = self.prompt.request_id
            logger.warning("%s: the peer that has this prompt is lost: its pages stay held for %g s", name, seconds)
            await until_noticed(seconds)
        await self.replica.release()
        if self.admission is not None:
            withdraw(self.engine, self.admission)


def is_end(request: Any) -> bool:
    """Whether what came of a call is its end: a release, or the end of its messages."""
    return request is grpc.aio.EOF or request.WhichOneof("step") == "release"


async def until_noticed(seconds: float) -> None:
    """Wait until the caller of a broken call must have noticed, and reads the pages no more."""
    await asyncio.sleep(seconds)


def prompt_state(state: dict[str, Any]) -> pb.PromptState:
    """The state of a replica as a message."""
    return pb.PromptState(cached=state["cached"], has_anchor=state["has_anchor"], queued_tokens=state["queued_tokens"])


def response_of(part: HeldPart | None) -> pb.PrefillPartResponse:
    """Where the pages of a part are, as a message."""
    if part is None:  # the caller knows that the part has no whole page
        return pb.PrefillPartResponse(held=pb.HeldPart())
    source = part.source
    addresses = msgspec.msgpack.encode(source.addresses)
    return pb.PrefillPartResponse(
        held=pb.HeldPart(start=source.start, page_ids=source.page_ids, addresses=addresses, hold=source.hold)
    )
