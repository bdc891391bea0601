"""Prompts that are split over replicas, in a worker: KV that stays on other replicas, and that others ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.attention_backends.star.remote_queries import RemoteStep
from starling.features.replicas.page_transfer import replica_metrics
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import RequestMetadata
from starling.vllm_compat.worker import kv_connector


class Replicas:
    """Worker side of split prefill."""

    @classmethod
    def make(cls, vllm_config: Any) -> Replicas:
        replica_metrics()  # on /metrics also where no page is ever moved
        return cls()

    def step(self, plans: Mapping[str, StarPlan], metadata: Mapping[str, RequestMetadata]) -> RemoteStep | None:
        """Return the keys of the step of these plans that other replicas hold, or None if all are here."""
        remote = {name: shards for name in plans if (shards := metadata[name].remote) is not None}
        return RemoteStep(remote, kv_connector().remote_attention) if remote else None


def open_shard(worker: Any, name: str, page_ids: list[int]) -> dict[str, Any]:
    """Let a worker answer queries from pages that are held under a name; returns where it takes them."""
    address: dict[str, Any] = kv_connector().open_shard(name, page_ids, lambda: worker.documents.made_rotations(worker))
    return address


def close_shards(worker: Any, names: list[str]) -> None:
    kv_connector().close_shards(names)


make = Replicas.make
