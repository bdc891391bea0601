"""Which of vLLM's model runners the installed vLLM has, and what they return in its form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from starling.vllm_compat.versions import release_of, vllm_version

HAS_V1 = release_of(vllm_version() or "") < (0, 34)
V1 = {"v1", "V1"}


def needs_v1(parameters: Any | None) -> bool:
    """Return whether a test runs model runner V1: one of its parameters (pytest's CallSpec2) has the id "v1"."""
    return parameters is not None and bool(V1 & set(re.split("[- ]", parameters.id)))


def runner_output(names: Sequence[str], sampled: Sequence[list[int]]) -> Any:
    """Return vLLM's ModelRunnerOutput of a step.

    Args:
        names: ids of the step's requests.
        sampled: the new tokens of each request.
    """
    from vllm.v1.outputs import ModelRunnerOutput

    index = {"req_id_to_index": {name: number for number, name in enumerate(names)}} if HAS_V1 else {}
    return ModelRunnerOutput(req_ids=list(names), sampled_token_ids=list(sampled), **index)
