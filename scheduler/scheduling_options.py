"""What a server's operator can say about scheduling: the `scheduler` section of the `starling` entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scheduler.options import OptionError

Switch = Literal["on", "off"]
Count = Annotated[int, Field(ge=1)]

SECTION = "scheduler"
LEAST_CHUNK = 2
"""Tokens: a star chunk of one can't always be run (StarMixin._reserve_prefill_lookahead)."""


class SchedulingOptions(BaseModel):
    """How prompts share the engine's steps, and what they may take from the prefix cache. A step is
    max_num_batched_tokens; a request alone on the engine is never held back."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fairness: Switch = Field(default="on", description="on: long prompts leave room in a step for everybody else")
    long_prompt_tokens: Count | None = Field(
        default=None,
        description="a prompt with more tokens than this to prefill as it arrives is long; default one whole step",
    )
    shared_step_tokens: Annotated[int, Field(ge=LEAST_CHUNK)] | None = Field(
        default=None,
        description="long prompts' tokens in a step that they share with others; default a quarter of the step",
    )
    shared_step_keys: Count | None = Field(
        default=None,
        description="query-key pairs of those tokens, per head and layer; default 49,152 for each shared_step_tokens",
    )
    star_block_reuse: Switch = Field(
        default="on",
        description="on: a star block that is cached is used wherever a hole before it ends the prefix hit",
    )


FIELDS = SchedulingOptions.model_fields
SWITCHES = ("fairness", "star_block_reuse")


def flat_name(field: str) -> str:
    """``fairness`` -> ``scheduler_fairness``."""
    return f"{SECTION}_{field}"


def parse_scheduling(values: Mapping[str, Any], prefix: str = f"{SECTION}.") -> SchedulingOptions:
    """Parse options under their bare names; ``prefix`` stands before a name in messages.

    Raises:
        OptionError: an unknown name, a wrong type or too small a number.
    """
    for key, value in values.items():
        if key not in FIELDS:
            raise OptionError(prefix + key, value, "there is no such scheduler option", ", ".join(FIELDS))
    try:
        return SchedulingOptions(**values)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        value = values[field]
        least = LEAST_CHUNK if field == "shared_step_tokens" else 1
        expected = "on or off" if field in SWITCHES else f"a whole number from {least}"
        reason = f"it must be {expected}, not {value!r} ({type(value).__name__})"
        raise OptionError(prefix + field, value, reason, expected) from None
