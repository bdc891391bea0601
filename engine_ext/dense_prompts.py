"""Prompts that have no star plan: those of streaming-input sessions and of beam search.

They run dense where star is the server's default, or where the request leaves it to the server (``auto``). A request
that asks for star is refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starling.config.parsing import OptionError
from starling.config.star import parse_options
from starling.vllm_compat.front import IS_BEAM

SESSION = "the prompt of a streaming-input session comes in pieces, so there is no whole prompt to plan"
BEAM = "beam search makes a new prompt of each beam and token, whose star blocks would be computed again and again"


def why_dense(prompt: Any) -> str | None:
    """Why a prompt of AsyncLLM.generate has no star plan; None: it can have one."""
    if isinstance(prompt, AsyncGenerator):
        return SESSION
    return BEAM if isinstance(prompt, Mapping) and IS_BEAM in prompt else None


def refuse_star_beams(given: Mapping[str, Any]) -> None:
    """Refuse the star options of a request with beam search, if they ask for star; sizes alone do so too.

    Raises:
        OptionError: the request asks for star, or an option has no such name or value.
    """
    options = parse_options(given)
    if given and (options.mode == "on" or "mode" not in options.model_fields_set):
        name = "star" if "star" in given else next(iter(given))
        raise OptionError(name, given[name], BEAM, "star=off or star=auto")
