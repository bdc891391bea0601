"""The HTTP request or gRPC call that a front is handling, in a context variable: its sender, and notes about it.

The HTTP middleware and gRPC's interceptor set it; the hooks of the plugin, the cache salt and responses read it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starling.engine_ext.front.bounds import SEQUENCES


@dataclass
class Call:
    """State of one HTTP request or gRPC call.

    Attributes:
        api_key: API key that the client sent, or empty if it sent none. A front has checked it only if the call needs a
            key.
        sees_cached: whether responses may say how many tokens were cached (vLLM's --enable-prompt-tokens-details, which
            a server with documents has).
        star: star options of the chat that is rendered for this call. vLLM's renderer does not get them.
        plans: plans of its prompts, as the header of an HTTP response shows them.
        max_plans: how many plans to keep, or None for all. Beam search makes a new prompt of each beam and token.
        request_ids: ids of the engine requests made for this call. A client may have chosen them.
        engine_ids: the engine's own, unique ids of these requests.
        num_sequences: number of choices of these requests together.
        only_looks_up: True if the prompt is not run, and only its cached tokens are looked up.
        cached: result of the look-up (look_up.py), or None if there is none yet.
    """

    api_key: str = ""
    sees_cached: bool = True
    star: Mapping[str, Any] = field(default_factory=dict)
    plans: list[dict[str, Any]] = field(default_factory=list)
    max_plans: int | None = None
    request_ids: list[str] = field(default_factory=list)
    engine_ids: set[str] = field(default_factory=set)
    num_sequences: int = 0
    only_looks_up: bool = False
    cached: dict[str, Any] | None = None

    def add_request(self, request_id: str, num_choices: int) -> None:
        """Note an engine request (raises VLLMValidationError if the call has too many)."""
        self.num_sequences += num_choices
        SEQUENCES.check(self.num_sequences)
        self.request_ids.append(request_id)

    def add_plan(self, plan: dict[str, Any]) -> None:
        if self.max_plans is None or len(self.plans) < self.max_plans:
            self.plans.append(plan)


# Set by both fronts; None in a program that uses the engine itself.
current_call: ContextVar[Call | None] = ContextVar("starling_call", default=None)


def this_call() -> Call:
    """Return the current call, and make it if there is none."""
    call = current_call.get()
    if call is None:
        call = Call()
        current_call.set(call)
    return call


def note_engine_request(request: Any) -> None:
    """Note that the current call has made an engine request (vLLM's EngineCoreRequest)."""
    call = current_call.get()
    if call is not None:
        call.engine_ids.add(request.request_id)


def note_star(options: Mapping[str, Any]) -> None:
    """Note the star options of the request whose chat is about to be rendered."""
    this_call().star = options


def sees_cached() -> bool:
    """Return whether the client may learn how many tokens of its prompt were cached."""
    call = current_call.get()
    return call is None or call.sees_cached


async def without_cached(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yield the engine's outputs without their number of cached tokens, which vLLM's Responses API always shows."""
    async with aclosing(outputs):
        async for output in outputs:
            output.num_cached_tokens = None
            yield output


async def with_sources(outputs: AsyncGenerator[Any, None], plan: dict[str, Any] | None) -> AsyncGenerator[Any, None]:
    """Yield the engine's outputs, and add the sources of the documents to the shown plan from the first output on."""
    async with aclosing(outputs):
        async for output in outputs:
            sources = getattr(output, "document_sources", None)  # an aborted request has an output of no engine
            if plan is not None and sources is not None:
                plan["document_sources"] = sources
            yield output
