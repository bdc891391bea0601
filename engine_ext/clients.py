"""Who sent the request that a front is handling, as far as the prefix cache is concerned."""

from __future__ import annotations

import hashlib
import secrets
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm import envs

ADMIN_KEY_ENV = "STARLING_ADMIN_KEY"
"""The environment variable with the key of who controls the server."""


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


def digest(key: str) -> bytes:
    """The SHA-256 digest of a key."""
    return hashlib.sha256(key.encode()).digest()


def has_valid_key(authorization: str, digests: Sequence[bytes]) -> bool:
    """Whether an `authorization: Bearer KEY` has one of the keys.

    The comparison takes constant time. Digests have one length, so the time does not depend on the keys' lengths.

    Args:
        digests: of the valid keys.
    """
    given = digest(bearer_key(authorization))
    matches = [secrets.compare_digest(given, key) for key in digests]
    return any(matches)


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
