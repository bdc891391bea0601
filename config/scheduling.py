"""Options of a server's scheduling and of its replicas: two sections of the `starling` entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from starling.config.parsing import Count, Share, Switch, parse_fields, read_number

SCHEDULING = "scheduler"
MIN_CHUNK = 2
"""Tokens: a star chunk of one token can't always run (scheduler/star_scheduler.py)."""


class SchedulingOptions(BaseModel):
    """Options for how prompts share the engine's steps, and for what the prefix cache keeps and prompts take from it.

    A step is max_num_batched_tokens. A request that is alone on the engine is never held back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fairness: Switch = Field(default="on", description="on: long prompts leave tokens of a step to all other requests")
    long_prompt_tokens: Count | None = Field(
        default=None,
        description="a prompt with more tokens than this to prefill as it arrives is long; default one whole step",
    )
    shared_step_tokens: Annotated[int, BeforeValidator(read_number), Field(ge=MIN_CHUNK)] | None = Field(
        default=None,
        description="long prompts' tokens in a step that they share with others; default a quarter of the step",
    )
    shared_step_keys: Count | None = Field(
        default=None,
        description="query-key pairs of those tokens, per head and layer; default 49,152 for each of "
        "shared_step_tokens",
    )
    star_block_reuse: Switch = Field(
        default="on",
        description="on: a star block that is cached is reused also where a block before it is not cached",
    )
    retained_share: Share = Field(
        default=0.5,
        description="share of the KV pages, 0 to 1, that may stay cached for longer than by their last use: those of "
        "sessions (session_id), and of requests that ask for it (star_retention); 0: none",
    )


FIELDS = SchedulingOptions.model_fields
SWITCHES = ("fairness", "star_block_reuse")


def parse_scheduling(values: Mapping[str, Any], prefix: str = f"{SCHEDULING}.") -> SchedulingOptions:
    """Parse options under their bare names; ``prefix`` stands before a name in messages.

    Raises:
        OptionError: an unknown name, a wrong type or too small a number.
    """
    return parse_fields(SchedulingOptions, values, SCHEDULING, expected=_expected, prefix=prefix)


def _expected(field: str) -> str:
    if field in SWITCHES:
        return "on or off"
    if field == "retained_share":
        return "a share of the KV pages, 0 to 1"
    return f"a whole number from {MIN_CHUNK if field == 'shared_step_tokens' else 1}"


REPLICAS = "replicas"
REPLICAS_EXPECTED = {"timeout": "a number above 0 (seconds)"}


class ReplicaOptions(BaseModel):
    """Options for how the replicas of one server work together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=30.0,
        description="seconds after which a replica that sends neither a response nor data is left out: another replica "
        "then computes the whole prompt; with --star-shards on the request fails",
    )


def parse_replicas(values: Mapping[str, Any], prefix: str = f"{REPLICAS}.") -> ReplicaOptions:
    """Parse options under their bare names; ``prefix`` stands before a name in messages.

    Raises:
        OptionError: an unknown name, or a timeout that is not a finite number above 0.
    """
    return parse_fields(ReplicaOptions, values, REPLICAS, expected=REPLICAS_EXPECTED.__getitem__, prefix=prefix)
