"""The star options of a request, and names that stand where nobody reads them: those are refused, not ignored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from starling.config.parsing import OptionError
from starling.config.star import FIELD_OF, FIELDS, StarOptions, flat_name, is_star_key, parse_options
from starling.scheduler.star.documents import refuse_many_offsets
from starling.scheduler.star.rules import SEGMENTS

OTHERS = frozenset({"start", "stats"})
"""Words that are nearly ``star`` and mean something else."""
CUTOFF = 0.8


def read_request(extra_args: Mapping[str, Any], num_tokens: int) -> StarOptions | None:
    """The star options of a request; None where it gives none.

    Args:
        extra_args: of its sampling parameters; keys of others stand there too.
        num_tokens: of its prompt.

    Raises:
        OptionError: an option has no such name or value, or a key is nearly one.
    """
    given = {key: value for key, value in extra_args.items() if is_star_key(key)}
    if len(given) < len(extra_args):
        for key in extra_args:
            if key not in given and (name := nearly(key)) is not None:
                raise OptionError(key, extra_args[key], f"there is no such option, did you mean {name}", name)
    if not given:
        return None
    refuse_many_offsets(given.get(SEGMENTS), num_tokens)
    return parse_options(given)


def nearly(key: str) -> str | None:
    """The star option that a key is nearly: one without its prefix, or misspelled. None: it means something else."""
    plain = key[:64].lower().replace("-", "_")
    if plain in FIELDS:
        return flat_name(plain)
    if plain in OTHERS or plain[:1] != "s":
        return None
    return next(iter(difflib.get_close_matches(plain, FIELD_OF, 1, CUTOFF)), None)


def refuse_at_top_level(fields: Iterable[str]) -> None:
    """Refuse star options among the unknown fields of a request's JSON, which vLLM ignores (raises OptionError)."""
    for name in fields:
        if name == "extra_args":
            raise OptionError(name, "...", "it is a parameter of Python's SamplingParams", "vllm_xargs")
        if is_star_key(name) or (nearly(name) in FIELD_OF and name not in FIELDS):
            option = name if name in FIELD_OF else nearly(name) or flat_name("mode")
            reason = "vLLM ignores it as a field of the request"
            raise OptionError(name, "...", reason, f'"vllm_xargs": {{"{option}": ...}}')
