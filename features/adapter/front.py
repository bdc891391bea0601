"""The server's adapter where requests arrive: which prompts run with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.lora.request import LoRARequest

from starling.config.adapter import StarAdapter
from starling.config.star import StarOptions
from starling.features.adapter.lora import adapter_of, lora_request
from starling.features.front_part import FrontPart
from starling.features.rule import options_of
from starling.scheduler.star.facts import PromptFacts
from starling.scheduler.star.plan import StarPlan


class Adapter(FrontPart):
    def __init__(self, adapter: StarAdapter) -> None:
        self.adapter = adapter

    @classmethod
    def make(cls, vllm_config: Any) -> Adapter | None:
        """Raises OptionError: the server's folder has no adapter that can be used."""
        adapter = adapter_of(options_of(vllm_config))
        return None if adapter is None else cls(adapter)

    def planned(self, plan: StarPlan, options: StarOptions, prompt: PromptFacts) -> StarPlan:
        """The plan with the adapter, where it was trained for such plans and the request names none of its own."""
        purpose = "documents" if plan.documents else "star"
        if purpose not in self.adapter.purposes or prompt.has_lora or options.adapter == "off":
            return plan
        return replace(plan, adapter=self.adapter.digest)

    def lora(self, plan: StarPlan, named: LoRARequest | None) -> LoRARequest | None:
        return lora_request(self.adapter) if plan.adapter else named


PARTS = (Adapter.make,)
