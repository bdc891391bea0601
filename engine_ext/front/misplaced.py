"""Star options that are in places where nobody reads them, or are misspelled: they are refused, not ignored."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from starling.config.entry import CACHE_SALT, ENTRY, PRESET, PRESETS
from starling.config.parsing import OptionError
from starling.config.star import (
    ALLOWED,
    FIELD_OF,
    FIELDS,
    SERVER_ONLY,
    STAR_RETENTION,
    flat_name,
    is_star_key,
    parse_options,
)

OTHERS = frozenset({"start", "stats"})
"""Words that are similar to ``star`` and mean something else."""
CUTOFF = 0.8
SALT_CUTOFF = 0.85
CAPITAL = re.compile("(?<=[a-z0-9])(?=[A-Z])")
SESSION, KV_HINTS = "session_id", "kv_hints"

XARGS, EXTRA_ARGS = "vllm_xargs", "extra_args"
HOLDERS = (XARGS, EXTRA_ARGS, ENTRY)
"""Fields that hold star options: in a request's JSON, in Python's SamplingParams, in a server's additional_config."""
NOT_READ = {
    "extra_body": "it is an argument of OpenAI's Python client, which sends the fields in it as fields of the request",
    "sampling_params": "the parameters are fields of the request themselves",
    "additional_config": "it is an option of the server",
    **dict.fromkeys(("extraArgs", "nvext", "options", "parameters", "params", "xargs"), "vLLM ignores it"),
}
"""Fields of other APIs in which users sometimes put star options, and why nobody reads them there."""
WRONG_VALUE = re.compile(rf"body\.{XARGS}\.(star\w*)(\..*)?")
"""Pattern of the parameter named in an error of vLLM: a star option whose value vLLM's request does not take."""


def plain_name(key: str) -> str:
    """Return a key as options are written: ``block_size`` for " Block-Size", ``blockSize``, ``starling.block_size``."""
    words = CAPITAL.sub("_", key[:64].strip()).lower()
    return re.sub("[- ]", "_", words.removeprefix(f"{ENTRY}."))


def nearly_salt(key: str) -> bool:
    """Return whether a key is a misspelled ``cache_salt``, without which a prompt shares its pages with all clients."""
    plain = plain_name(key).replace("_", "")
    return key != CACHE_SALT and bool(difflib.get_close_matches(plain, [CACHE_SALT.replace("_", "")], 1, SALT_CUTOFF))


def refuse_misspelled(fields: Mapping[str, Any]) -> None:
    """Refuse unknown fields in a request's JSON that resemble fields whose absence nobody would notice (OptionError).

    A server without Starling ignores them, so call this only on servers for which it is activated.
    """
    for name, value in fields.items():
        inside = next(filter(nearly_salt, value), None) if name in NOT_READ and isinstance(value, Mapping) else None
        if nearly_salt(name) or inside is not None:
            raise OptionError(name, value, f"there is no such field, did you mean {CACHE_SALT}", f"{CACHE_SALT}")
        if name in NOT_READ and isinstance(value, Mapping) and CACHE_SALT in value:
            raise OptionError(name, value, NOT_READ[name], f"{CACHE_SALT} as a field of the request")
        if name != SESSION and plain_name(name) == SESSION:
            raise OptionError(name, value, f"there is no such field, did you mean {SESSION}", SESSION)
        if plain_name(name) == KV_HINTS:
            raise OptionError(
                name, value, "vLLM ignores it as a field of the request", f'"{XARGS}": {{"{STAR_RETENTION}": ...}}'
            )


def nearly(key: str) -> str | None:
    """Return the star option that a key resembles (without prefix, or misspelled), or None if it resembles none."""
    plain = plain_name(key)
    if plain in FIELDS:
        return flat_name(plain)
    if plain in OTHERS or plain[:1] != "s":
        return None
    return next(iter(difflib.get_close_matches(plain, FIELD_OF, 1, CUTOFF)), None)


def is_option(key: str) -> bool:
    """Return whether a key among others is a star option, maybe misspelled: ``mode`` alone is something else there."""
    return is_star_key(key) or (key not in FIELDS and nearly(key) is not None)


def is_preset(key: str, value: Any) -> bool:
    """Return whether a key in a request is the server's option `preset`."""
    return key == PRESET and isinstance(value, str) and value in PRESETS


def refuse_preset(key: str, value: Any) -> None:
    """Refuse the server's option `preset` in a request (raises OptionError)."""
    if is_preset(key, value):
        reason = f"it is an option of the server, --{PRESET}, and not of a request"
        raise OptionError(key, value, reason, ", ".join(FIELD_OF))


def refuse_among_options(key: str, value: Any) -> None:
    """Refuse a key among a request's star options that has an effect only elsewhere (raises OptionError)."""
    refuse_preset(key, value)
    if key == CACHE_SALT or nearly_salt(key):
        raise OptionError(key, value, f"{XARGS} has no such option", "the field of the request, or of Python's prompt")


def refuse_at_top_level(fields: Mapping[str, Any]) -> None:
    """Refuse star options among the unknown fields of a request's JSON, which vLLM ignores (raises OptionError)."""
    for name, value in fields.items():
        refuse_preset(name, value)
        if name == EXTRA_ARGS:
            raise OptionError(name, value, "it is a parameter of Python's SamplingParams", XARGS)
        if name == ENTRY:
            raise misplaced(name, value, "vLLM ignores it as a field of the request", value)
        if difflib.get_close_matches(name[:64], [XARGS], 1, CUTOFF):
            raise misplaced(name, value, f"there is no such field, did you mean {XARGS}", value)
        if name in SERVER_ONLY:
            parse_options({name: value})  # says so
        if is_option(name):
            raise misplaced(name, value, "vLLM ignores it as a field of the request", {name: value})
        if name in NOT_READ and isinstance(value, Mapping) and any(key in HOLDERS or is_option(key) for key in value):
            raise misplaced(name, value, NOT_READ[name], value)


def misplaced(name: str, value: Any, reason: str, holds: Any) -> OptionError:
    """Return the error for a field that holds star options where nobody reads them."""
    return OptionError(name, value, reason, f'"{XARGS}": {{"{first_option(holds)}": ...}} as a field of the request')


def first_option(holds: Any) -> str:
    """Return the first star option in a field or in the fields in it, or ``star`` if none has the name of an option."""
    for key, value in holds.items() if isinstance(holds, Mapping) else ():
        if key in HOLDERS:
            return first_option(value)
        if is_option(key):
            return key if key in FIELD_OF else nearly(key) or flat_name("mode")
    return flat_name("mode")


def explained(message: str, parameter: str | None) -> str:
    """Return an error message of vLLM, or, for a star option of a wrong type, a message with the allowed values.

    vLLM's own message lists the pydantic types that do not fit the value.
    """
    found = WRONG_VALUE.fullmatch(parameter or "")
    if found is None:
        return message
    allowed = ALLOWED.get(FIELD_OF.get(found[1], ""), "a whole number of tokens, 0 or more")
    reason = f"a value in {XARGS} is a text, a number or a list of them"
    return f"{found[1]} is refused: {reason}. Allowed: {allowed}."
