"""Time of a step of a model on GPUs, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from starling.features.fairness.step_budget import attended
from starling.scheduler.planning.plan import StarPlan


@dataclass(frozen=True)
class Machine:
    """A model on GPUs. The defaults: Llama-3.1-70B in bfloat16 on eight H100s.

    A step takes the longer of its arithmetic and its reads from memory, and a fixed time.

    Attributes:
        flops, bandwidth: operations and bytes per second that all GPUs reach together in practice.
        weights: the model's parameters; two bytes each.
        layers, width: number of layers, and query heads times head size.
        kv_bytes: bytes of one token's keys and values, in all layers.
        fixed_seconds: time of a step for launches, collectives and the host.
        cache_tokens: room of the KV cache.
    """

    flops: float = 8 * 500e12
    bandwidth: float = 8 * 2.3e12
    weights: float = 70e9
    layers: int = 80
    width: int = 8192
    kv_bytes: int = 2 * 80 * 1024 * 2
    fixed_seconds: float = 0.006
    cache_tokens: int = 1_300_000

    def step_seconds(self, chunks: Iterable[tuple[int, int, StarPlan | None]]) -> float:
        """Return the seconds of a step.

        Args:
            chunks: (first position, tokens, plan) of each request.
        """
        tokens = pairs = keys = 0
        for start, count, plan in chunks:
            tokens += count
            pairs += attended(plan, start, start + count)
            keys += start + count
        arithmetic = (2 * self.weights * tokens + 4 * self.layers * self.width * pairs) / self.flops
        memory = (2 * self.weights + self.kv_bytes * keys) / self.bandwidth
        return self.fixed_seconds + max(arithmetic, memory)
