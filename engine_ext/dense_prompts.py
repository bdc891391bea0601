"""Prompts that have no star plan: those of streaming-input sessions and of beam search.

They run dense where star is the server's default, or where the request leaves it to the server (``auto``). A request
that asks for star is refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starling.scheduler.star.options import parse_options
from starling.scheduler.star.parsing import OptionError
from starling.vllm_compat.front import IS_BEAM

SESSION = "the prompt of a streaming-input session comes in pieces, so there is no whole prompt to plan"
BEAM = "beam search makes a new prompt of each beam and token, whose star blocks would be computed again and again"


def why_dense(prompt: Any) -> str | None:
    """Why a prompt of AsyncLLM.generate has no star plan; None: it can have one."""
    if isinstance(prompt, AsyncGenerator):
        return SESSION
    return BEAM if isinstance(prompt, Mapping) and IS_BEAM in prompt else None


def refuse_star(given: Mapping[str, Any], mode: str, reason: str) -> None:
    """Refuse the star options of a prompt that has no star plan, if they ask for one.

    Args:
        given: the request's star options, by flat names.
        mode: the request's, else the server's.
        reason: as ``why_dense`` returns it.

    Raises:
        OptionError: the request asks for star.
    """
    if mode == "on" and given:
        name = "star" if "star" in given else next(iter(given))
        raise OptionError(name, given[name], reason, "star=off or star=auto")


def refuse_star_beams(given: Mapping[str, Any]) -> None:
    """Refuse the star options of a request with beam search, as ``refuse_star`` does; sizes alone ask for star too.

    Raises:
        OptionError: the request asks for star, or an option has no such name or value.
    """
    options = parse_options(given, flat=True)
    refuse_star(given, options.mode if "mode" in options.model_fields_set else "on", BEAM)
