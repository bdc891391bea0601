"""Keys of clients, and of the operator of the server."""

from __future__ import annotations

import hashlib
import secrets
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from vllm import envs


def authorization_of(scope: Any) -> str:
    """Return the `authorization` header of an ASGI request (its header names are in lower case), or "" without one."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), "")


def path_of(scope: Any) -> str:
    """Return the path of an ASGI request, without the server's --root-path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def bearer_key(authorization: str) -> str:
    """Return the key of an `authorization: Bearer KEY` value, or "" if it has none."""
    scheme, _, key = authorization.partition(" ")
    return key if scheme.lower() == "bearer" else ""


def digest(key: str) -> bytes:
    """Return the SHA-256 digest of a key."""
    return hashlib.sha256(key.encode()).digest()


def has_valid_key(authorization: str, digests: Sequence[bytes]) -> bool:
    """Return whether an `authorization: Bearer KEY` value has one of the valid keys.

    The comparison takes constant time. All digests have the same length, so the time does not depend on the keys'
    lengths.

    Args:
        digests: digests of the valid keys.
    """
    given = digest(bearer_key(authorization))
    matches = [secrets.compare_digest(given, key) for key in digests]
    return any(matches)


def api_keys(args: Namespace) -> list[str]:
    """Return the keys that clients may use, from vLLM's arguments and environment; empty if clients need no key."""
    return [key for key in args.api_key or [envs.VLLM_API_KEY] if key]
