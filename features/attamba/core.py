"""The compressed cache of Attamba models, in the engine core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starling.config.entry import StarlingConfig
from starling.scheduler.cache_state import cache_state, compressed_groups, states_used
from starling.scheduler.core_metrics import cache_metrics
from starling.scheduler.part import CorePart
from starling.vllm_compat.kv_pages import CacheGroup


class CompressedCache(CorePart):
    """Series of a compressed KV cache: its size, and after each step the states that requests hold."""

    def __init__(self, scheduler: Any, groups: Sequence[CacheGroup]) -> None:
        self.scheduler = scheduler
        self.groups = groups

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> CompressedCache | None:
        groups = compressed_groups(scheduler)
        if not groups:
            return None
        metrics = cache_metrics()
        state = cache_state(scheduler, per_request=False)
        for index, group in enumerate(state["groups"]):
            metrics.bytes_per_token.labels(str(index), group["kind"]).set(group.get("bytes_per_token", 0))
        for cache, field in (("compressed", "capacity_tokens"), ("uncompressed", "uncompressed_capacity_tokens")):
            metrics.capacity.labels(cache).set(state.get(field, 0))
        return cls(scheduler, groups)

    def outputs(self, outputs: dict[int, Any]) -> None:
        cache_metrics().states.set(sum(states_used(self.scheduler, group) for group in self.groups))


PARTS = (CompressedCache.make,)
