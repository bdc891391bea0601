"""Star options that stand where nobody reads them, or are misspelled: they are refused, not ignored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from starling.config.parsing import OptionError
from starling.config.star import FIELD_OF, FIELDS, flat_name, is_star_key

OTHERS = frozenset({"start", "stats"})
"""Words that are nearly ``star`` and mean something else."""
CUTOFF = 0.8


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
