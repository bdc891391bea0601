"""What a feature does where requests arrive: the hooks of a part, over which a front loops (engine_ext/front/)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from starling.config.star import StarOptions
from starling.scheduler.star.facts import PromptFacts
from starling.scheduler.star.plan import StarPlan


class FrontPart:
    """One feature's part of one front. The hooks do nothing here: a part has those that it needs.

    Parts are called in the order of features/__init__.py. `starling doctor` has them too.

    Args:
        vllm_config: vLLM's configuration of an engine, for which Starling is activated.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    @classmethod
    def make(cls, vllm_config: Any) -> Self | None:
        """The part; None: it has nothing to do here."""
        return cls(vllm_config)

    def facts(self) -> Mapping[str, Any]:
        """What the feature knows of the engine, as fields of EngineFacts, by which plans are decided."""
        return {}

    def planned(self, plan: StarPlan, options: StarOptions, prompt: PromptFacts) -> StarPlan:
        """The plan of a prompt, which is decided but for the replicas, as the feature changes it.

        Args:
            options: the request's, and the server's where it gives none.
        """
        return plan

    def check(self, plan: StarPlan, params: Any) -> None:
        """Refuse a request's SamplingParams that can't be used with its prompt's plan (raises OptionError)."""

    def lora(self, plan: StarPlan, named: Any) -> Any:
        """The LoRA adapter (LoRARequest) with which a prompt runs; None: the model alone.

        Args:
            named: the request's own, or that of an earlier part; None: none.
        """
        return named
