"""Who sent the request that a front is handling, as far as the prefix cache is concerned."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm import envs


@dataclass(frozen=True)
class Client:
    """The client of an HTTP request or a gRPC call.

    Attributes:
        api_key: that the client sent; empty where it sent none. A front has checked it only where the call needs a key.
        sees_cached: whether responses may say how many tokens were cached (vLLM's --enable-prompt-tokens-details).
    """

    api_key: str
    sees_cached: bool


# The client of the request being handled, set by both fronts; None in a program that uses the engine itself.
current_client: ContextVar[Client | None] = ContextVar("starling_client", default=None)


def bearer_key(authorization: str) -> str:
    """The key of an `authorization: Bearer KEY`; empty where there is none."""
    scheme, _, key = authorization.partition(" ")
    return key if scheme.lower() == "bearer" else ""


def api_keys(args: Namespace) -> list[str]:
    """The keys that clients of a server may use, from vLLM's arguments and environment; none: clients need no key."""
    return [key for key in args.api_key or [envs.VLLM_API_KEY] if key]


def sees_cached() -> bool:
    """Whether the current client may learn how many tokens of its prompt were cached."""
    client = current_client.get()
    return client is None or client.sees_cached


async def without_cached(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The engine's outputs without their number of cached tokens, which vLLM's Responses API shows in any case."""
    async with aclosing(outputs):
        async for output in outputs:
            output.num_cached_tokens = None
            yield output
