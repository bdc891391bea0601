"""Keys of clients and of the operator, and cache salts: each engine input gets the one that `cache_salt` asks for.

Prompts share pages only if their salts are equal. With block reuse a client can probe for one star block of another
client's prompt without knowing the text before the block: only salts keep clients apart.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMValidationError

from starling.config.entry import CACHE_SALT
from starling.config.parsing import OptionError
from starling.engine_ext.front.call import Call, current_call


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


def derived_salt(api_key: str, salt: str | None) -> str:
    """Return the salt of a client's prompts: an HMAC-SHA256 over the request's own salt, keyed with the API key.

    The salt is the same in all processes and on all hosts. The API key can't be computed from it.
    """
    message = b"" if salt is None else b"\0" + salt.encode(errors="surrogatepass")
    return hmac.new(
        api_key.encode(errors="surrogatepass"), b"starling cache_salt" + message, hashlib.sha256
    ).hexdigest()


def salt_for(setting: str, salt: str | None, client: Call | None) -> str | None:
    """Return the salt with which a request reaches the engine.

    Args:
        setting: value of the server's option, see config/entry.py.
        salt: the request's own salt.
        client: the call of the client, or None if there is none.

    Raises:
        OptionError: the server requires a salt or an API key, and the request has none.
    """
    if setting == "required" and not salt:
        raise OptionError(
            CACHE_SALT,
            salt,
            "this server runs with --cache-salt required",
            "a text of 1 to 128 characters that others don't know",
        )
    if setting != "api-key":
        return salt
    if client is None or not client.api_key:
        reason = "this server derives it from the API key (--cache-salt api-key), and the request has none"
        raise OptionError(CACHE_SALT, salt, reason, "any, with `authorization: Bearer <API key>`")
    return derived_salt(client.api_key, salt)


def part_with_salt(engine_input: Mapping[str, Any]) -> str | None:
    """Return the key of the part of an engine input in which vLLM looks for the salt, or None for the input itself.

    The prompt of an encoder-decoder model has the salt in the decoder's prompt or, before it is rendered, in the
    encoder's.
    """
    if engine_input.get("type") == "enc_dec":
        return "decoder_prompt"
    return "encoder_prompt" if "type" not in engine_input and "encoder_prompt" in engine_input else None


def salted(setting: str, engine_input: Any) -> Any:
    """Return an engine input with the salt that it gets on this server.

    Raises:
        VLLMValidationError: ``salt_for`` raised an OptionError, or a prompt that can't hold a salt needs one.
    """
    if setting == "request":
        return engine_input
    part = part_with_salt(engine_input) if isinstance(engine_input, Mapping) else None
    holder = engine_input if part is None else engine_input[part]
    try:
        if not isinstance(holder, Mapping):  # a text, or a session whose prompt comes in pieces
            reason = f"prompts of type {type(holder).__name__} have none, with --cache-salt {setting}"
            raise OptionError(CACHE_SALT, None, reason, "a prompt that is given as a whole, as a mapping")
        salt = salt_for(setting, holder.get(CACHE_SALT), current_call.get())
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter=CACHE_SALT) from None
    holder = {**holder, CACHE_SALT: salt}
    return holder if part is None else {**engine_input, part: holder}
