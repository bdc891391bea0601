"""Counting of Starling's own requests in vLLM's admission limits: a prompt counts once, until all its parts have run.

A front admits a prompt that is split over replicas before the engine knows it. Until the engine gets it, it runs in
parts under ids of its own, or waits for memory. Goes when vLLM has requests of its own making, and lets a front admit a
request before it hands it over.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from vllm.exceptions import VLLMClientError

from starling.vllm_compat.patching import Original, touches, wrap


class RequestWithdrawn(VLLMClientError):
    """A request was withdrawn between its admission and its arrival. AsyncLLM.generate raises it as it is."""


class Admission:
    """A request that is admitted, and that the engine gets later.

    Args:
        num_requests: number of requests that it counts as; a request with n > 1 counts as n.
        num_tokens: tokens of its prompt.

    Attributes:
        engine_request_id: the engine's own id of the request, or None until the engine gets it.
    """

    def __init__(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests, self.num_tokens = num_requests, num_tokens
        self.engine_request_id: str | None = None


_arriving: ContextVar[Admission | None] = ContextVar("starling_arriving", default=None)
_admitted: WeakKeyDictionary[Any, set[Admission]] = (
    WeakKeyDictionary()
)  # by output processor, until the engine has them
_parts: WeakKeyDictionary[Any, Collection[str]] = WeakKeyDictionary()


def admit(engine: Any, request_id: str, num_requests: int, num_tokens: int) -> Admission:
    """Admit a request that the engine of an AsyncLLM gets later; it counts until ``withdraw``, or until it arrives.

    Raises:
        QueueOverflowError, MaxQueuedTokensError: the server's limits are reached.
        Exception: the one that ``refuse_admission`` was given.
    """
    engine.check_admission(num_requests, request_id)
    _count(engine.output_processor)
    admission = Admission(num_requests, num_tokens)
    _admitted.setdefault(engine.output_processor, set()).add(admission)
    _report(engine.output_processor)
    return admission


def withdraw(engine: Any, admission: Admission) -> None:
    """Count an admitted request no longer: it has ended. Where the engine does not have it yet, it gets it no more."""
    _admitted.get(engine.output_processor, set()).discard(admission)
    _report(engine.output_processor)


async def admitted_outputs(outputs: AsyncGenerator[Any, None], admission: Admission) -> AsyncGenerator[Any, None]:
    """Yield what AsyncLLM.generate yields for an admitted request, without a second check of the limits.

    Raises:
        RequestWithdrawn: the request was withdrawn before the engine got it.
    """
    async with aclosing(outputs):
        token = _arriving.set(admission)
        try:
            first = [await anext(outputs)]
        except StopAsyncIteration:
            first = []
        finally:
            _arriving.reset(token)
        for output in first:
            yield output
        async for output in outputs:
            yield output


def has_arrived(engine: Any, request_id: str | None) -> bool:
    """Return whether the request that vLLM checks is admitted already; if so, count it as the engine's from now on.

    Raises:
        RequestWithdrawn: it was withdrawn meanwhile.
    """
    admission = _arriving.get()
    if admission is None or admission.engine_request_id is not None:
        return False
    if admission not in _admitted.get(engine.output_processor, ()):
        raise RequestWithdrawn(f"request {request_id} was withdrawn before the engine got it")
    admission.engine_request_id = request_id
    withdraw(engine, admission)
    return True


def hide_requests(output_processor: Any, engine_request_ids: Collection[str]) -> None:
    """Leave these requests out of vLLM's request statistics and of what admission counts.

    Args:
        engine_request_ids: ids that are read at each look, so that their owner may add and remove some.
    """
    _count(output_processor)
    _parts[output_processor] = engine_request_ids


@touches("vllm.v1.engine.output_processor.OutputProcessor._update_admission_stats")
def _report(output_processor: Any) -> None:
    """Let the other API servers of one engine count what has changed."""
    output_processor._update_admission_stats()


@touches(
    "vllm.v1.engine.output_processor.OutputProcessor.request_states",
    "vllm.v1.engine.output_processor.RequestState.{is_prefilling, prompt_len}",
)
def _count(output_processor: Any) -> None:
    """Wrap what counts requests in a front, once."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    @wrap(OutputProcessor, "_update_stats_from_output")
    @wrap(OutputProcessor, "_update_stats_from_finished")
    def update_stats(original: Original, self: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        if req_state.request_id not in _parts.get(self, ()):
            original(self, req_state, *args, **kwargs)

    @wrap(OutputProcessor, "get_num_unfinished_requests")
    def get_num_unfinished_requests(original: Original, self: Any) -> int:
        admitted = sum(admission.num_requests for admission in _admitted.get(self, ()))
        return original(self) + admitted - len(_states_of_parts(self))

    @wrap(OutputProcessor, "get_num_queued_tokens")
    def get_num_queued_tokens(original: Original, self: Any) -> int:
        admitted = sum(admission.num_tokens for admission in _admitted.get(self, ()))
        in_parts = sum(state.prompt_len for state in _states_of_parts(self) if state.is_prefilling)
        return original(self) + admitted - in_parts

    @wrap(AsyncLLM, "check_admission")
    def check_admission(original: Original, self: Any, n: int = 1, request_id: str | None = None) -> None:
        if not has_arrived(self, request_id):
            original(self, n, request_id)


@touches("vllm.v1.engine.output_processor.OutputProcessor.request_states")
def _states_of_parts(output_processor: Any) -> list[Any]:
    states = output_processor.request_states
    return [states[name] for name in _parts.get(output_processor, ()) if name in states]
