"""Front side of the server's adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.lora.request import LoRARequest

from starling.attention_backends.star.refusals import options_of
from starling.config.adapter import StarAdapter
from starling.config.star import StarOptions
from starling.features.adapter.lora import adapter_of, lora_request
from starling.scheduler.planning.facts import PromptFacts
from starling.scheduler.planning.plan import StarPlan


class Adapter:
    """Front side of the server's adapter: which prompts run with it."""

    def __init__(self, adapter: StarAdapter) -> None:
        self.adapter = adapter

    def planned(self, plan: StarPlan, options: StarOptions, prompt: PromptFacts) -> StarPlan:
        """Add the adapter to a plan if it was trained for plans like this one and the request names none of its own."""
        purpose = "documents" if plan.documents else "star"
        if purpose not in self.adapter.purposes or prompt.has_lora or options.adapter == "off":
            return plan
        return replace(plan, adapter=self.adapter.digest)

    def lora(self, plan: StarPlan, named: LoRARequest | None) -> LoRARequest | None:
        return lora_request(self.adapter) if plan.adapter else named


def make(vllm_config: Any) -> Adapter | None:
    """Return the adapter of a server, or None if it has none (raises OptionError: its folder has no usable one)."""
    adapter = adapter_of(options_of(vllm_config))
    return None if adapter is None else Adapter(adapter)
