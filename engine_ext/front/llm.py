"""`starling.LLM`: vLLM's LLM with Starling activated, and Star Attention's options as an argument of its own."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import vllm
from vllm import RequestOutput, SamplingParams

from starling.config.entry import ENTRY, refuse_missing_plugin
from starling.config.parsing import OptionError
from starling.config.star import Star, flat_options, parse_options
from starling.vllm_compat.versions import problem

if TYPE_CHECKING:

    class Output(RequestOutput):
        """RequestOutput of vLLM, with the fields that Starling adds.

        Attributes:
            plan: how the prompt was prefilled: ``plan["attention"]`` is "star" or "dense", ``plan["why"]`` says why.
            document_sources: number of tokens of each document's KV by source, or None if there are no documents.
        """

        plan: dict[str, Any]
        document_sources: list[dict[str, int]] | None


class LLM(vllm.LLM):
    """The LLM class of vLLM with Starling activated.

    ``star`` holds Star Attention's options in all methods: "on", "off" or "auto", a dict such as ``{"mode": "on",
    "block_size": "n/8"}``, or StarOptions. All other arguments are vLLM's.
    """

    def __init__(
        self,
        model: str,
        *,
        star: Star | None = None,
        additional_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Start an engine with Starling activated.

        Args:
            model: name or path of the model, as for vLLM's LLM.
            star: the options of requests that give none of their own. Default: off.
            additional_config: as for vLLM's LLM; its `starling` entry may hold further options.
            options: further options of vLLM's LLM.

        Raises:
            OptionError: a star option can't be used, or ``additional_config`` gives it another value.
            ImportError: Starling can't extend the installed vLLM.
            ValueError: the environment keeps Starling out of vLLM; or vLLM refuses its own options.
        """
        if (reason := problem()) is not None:
            raise ImportError(reason)
        refuse_missing_plugin(os.environ)
        super().__init__(model, additional_config=activated(additional_config or {}, star), **options)

    def generate(  # type: ignore[override]
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        star: Star | None = None,
        **options: Any,
    ) -> list[Output]:
        """Generate outputs as vLLM's ``LLM.generate`` does.

        Args:
            star: options of these prompts, in place of the engine's.

        Raises:
            OptionError: a star option can't be used.
        """
        return cast("list[Output]", super().generate(prompts, self._with_star(sampling_params, star), **options))

    def chat(  # type: ignore[override]
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *arguments: Any,
        star: Star | None = None,
        **options: Any,
    ) -> list[Output]:
        """Chat as vLLM's ``LLM.chat`` does, with ``star`` in place of the engine's options (raises OptionError)."""
        params = self._with_star(sampling_params, star)
        return cast("list[Output]", super().chat(messages, params, *arguments, **options))

    def _with_star(self, params: Any, star: Star | None) -> Any:
        if star is None:
            return params
        given = flat_options(star)
        parse_options(given)
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return with_star(params, given)
        return [with_star(each, given) for each in params]


def with_star(params: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """Return a copy of sampling parameters with star options, under their flat names, in its extra_args."""
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), **given}
    return params


def activated(additional_config: Mapping[str, Any], star: Star | None) -> dict[str, Any]:
    """Return ``additional_config`` with the entry that activates Starling (raises OptionError)."""
    entry = additional_config.get(ENTRY, {})
    given = {} if star is None else flat_options(star)
    parse_options(given)
    for name, value in given.items():
        if isinstance(entry, Mapping) and entry.get(name, value) != value:
            reason = f"additional_config says {name}={entry[name]!r}"
            raise OptionError(name, value, reason, "one of the two, or the same")
    return {**additional_config, ENTRY: {**entry, **given} if isinstance(entry, Mapping) else entry}
