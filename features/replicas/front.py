"""Replicas where requests arrive: over which a prompt may be split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.features.front_part import FrontPart
from starling.features.replicas.rules import replica_set
from starling.scheduler.star.request_metadata import default_num_shards


class Replicas(FrontPart):
    def facts(self) -> Mapping[str, Any]:
        return {"replicas": replica_set(self.vllm_config), "divides_kv": default_num_shards(self.vllm_config) > 1}


PARTS = (Replicas.make,)
