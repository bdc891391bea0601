"""Options of a server's replicas: the `replicas` section of the `starling` entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from starling.config.parsing import parse_fields

SECTION = "replicas"
EXPECTED = {"timeout": "a number above 0 (seconds)"}


class ReplicaOptions(BaseModel):
    """Options for how the replicas of one server work together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=30.0,
        description="seconds after which a replica that sends neither a response nor data is left out: another replica "
        "then computes the whole prompt; with --star-shards on the request fails",
    )


def parse_replicas(values: Mapping[str, Any], prefix: str = f"{SECTION}.") -> ReplicaOptions:
    """Parse options under their bare names; ``prefix`` stands before a name in messages.

    Raises:
        OptionError: an unknown name, or a timeout that is not a finite number above 0.
    """
    return parse_fields(ReplicaOptions, values, SECTION, expected=EXPECTED.__getitem__, prefix=prefix)
