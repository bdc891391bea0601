"""The keys of clients, and of who controls the server."""

from __future__ import annotations

import hashlib
import secrets
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from vllm import envs


def authorization_of(scope: Any) -> str:
    """The header `authorization` of a request of ASGI, whose names are in lower case; empty where there is none."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), "")


def path_of(scope: Any) -> str:
    """The path of a request of ASGI, without the server's --root-path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


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
