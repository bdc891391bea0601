"""Heads that see everything while the others see star blocks, in a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from starling.attention_backends.star.head_calls import unsupported_reason
from starling.attention_backends.star.head_step import HeadStep
from starling.attention_backends.star.model_heads import ranks_of_layers, scores_of
from starling.attention_backends.star.refusals import HEADS, HEADS_ORDER, has_dense_heads, has_documents
from starling.config.entry import STAR_HEADS, config_of
from starling.config.head_scores import HeadScores
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.rules import HEADS as DENSE_HEADS
from starling.vllm_compat.rotary_layers import attention_blocks


class HeadLayers:
    """Dense heads in the layers of a worker's model.

    Attributes:
        problem: reason why the layers of the loaded model can't have dense heads, or None if they can.
        scores: scores of the model's heads, or None if there are none.
        ranks: layer name -> (KV heads,) the places of this rank's heads in the order of the scores.
    """

    def __init__(self, on_cpu: bool, attends_by_parts: bool) -> None:
        self.on_cpu, self.attends_by_parts = on_cpu, attends_by_parts
        self.problem: str | None = None
        self.scores: HeadScores | None = None
        self.ranks: dict[str, np.ndarray] = {}

    @classmethod
    def make(cls, vllm_config: Any) -> HeadLayers:
        on_cpu = vllm_config.device_config.device_type == "cpu"
        return cls(on_cpu, not on_cpu and has_dense_heads(vllm_config) and not has_documents(vllm_config))

    def layers_known(self, worker: Any, full: list[str], others: list[str]) -> None:
        """Find the ranks of the heads of the full-attention layers, once the KV cache is there.

        Raises:
            RuntimeError: the layers can't run what the server's options ask for.
        """
        self.scores = scores_of(worker.vllm_config)
        if self.scores is None:
            return
        model = worker.model_runner.get_model()
        self.ranks, self.problem = ranks_of_layers(self.scores, model, full, others)
        if self.problem is None and (self.on_cpu or self.attends_by_parts):
            blocks = attention_blocks(model)
            reasons = ((name, unsupported_reason(blocks[name].attention)) for name in self.ranks)
            self.problem = next((f"layer {name}: {reason}" for name, reason in reasons if reason), None)
        if self.problem is None:
            return
        config = config_of(worker.vllm_config)
        if config is not None and has_dense_heads(worker.vllm_config) and config.star.mode != "off":
            share = config.star.dense_heads
            asked = f"{STAR_HEADS}={config.star_heads}" if share is None else f"{DENSE_HEADS}={share}"
            raise RuntimeError(f"{asked}: {self.problem}")

    def step(self, plans: Mapping[str, StarPlan]) -> HeadStep | None:
        """Return the dense heads of the step of these plans, by request id, or None if it has none.

        Raises:
            RuntimeError: a plan's dense heads are not those of this worker's scores.
        """
        asked = [plan.dense_heads for plan in plans.values() if plan.dense_heads]
        for heads in asked:
            if self.problem is not None:
                raise RuntimeError(f"a plan has {heads.count} dense heads: {self.problem}")
            if self.scores is None or self.scores.digest(heads.count) != heads.digest:
                raise RuntimeError(f"a plan has {heads.count} dense heads, which are not those of this worker's scores")
        return HeadStep(plans.values(), self.ranks) if asked else None

    def report(self) -> dict[str, str | None]:
        return {HEADS: self.problem, HEADS_ORDER: None if self.scores is None else self.scores.order_digest}
