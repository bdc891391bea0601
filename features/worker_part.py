"""What a feature does in a worker: the hooks of a part, over which the worker loops (star_worker.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from starling.attention_backends.star.step_part import StepPart
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import RequestMetadata


class Layers(NamedTuple):
    """The names of a loaded model's layers: those of full attention, whose rows are split, and the others."""

    full: list[str]
    others: list[str]


class WorkerPart:
    """One feature's part of one worker. The hooks do nothing here: a part has those that it needs.

    Parts are called in the order of features/__init__.py. ``worker`` is vLLM's, with its configuration and its
    model runner.

    Attributes:
        attends_by_parts: whether layers on a GPU are made to attend by what the part has of a step.
    """

    attends_by_parts = False

    @classmethod
    def make(cls, vllm_config: Any) -> Self | None:
        """The part, before vLLM's worker is made; None: it has nothing to do here."""
        return cls()

    def loaded(self, worker: Any) -> None:
        """The model is loaded. vLLM captures graphs next, and sizes the KV cache by what they take.

        Raises:
            RuntimeError: the model can't run what the server's options ask for.
        """

    def layers_known(self, worker: Any, layers: Layers) -> None:
        """The KV cache is there, and full-attention layers split their rows (raises RuntimeError, as ``loaded``)."""

    def before_warm_up(self, worker: Any) -> None:
        """vLLM is about to warm up, after which it watches for kernels that are compiled later."""

    def warmed_up(self, worker: Any) -> None:
        """vLLM has warmed up, and takes no requests yet (raises RuntimeError, as ``loaded``)."""

    def step_part(
        self, worker: Any, plans: Mapping[str, StarPlan], metadata: Mapping[str, RequestMetadata]
    ) -> StepPart | None:
        """What the feature has of the step of these plans, by request id; None: nothing.

        Args:
            metadata: of these and of other requests.

        Raises:
            RuntimeError: the worker can't run a plan.
        """
        return None

    def report(self) -> dict[str, str | None]:
        """Fields of the engine's report (engine_report.py): why the loaded model can't run this, or None."""
        return {}
