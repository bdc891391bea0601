"""The parts of Starling's schedulers, in the order in which they are called. A feature's part is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starling.config.entry import StarlingConfig
from starling.scheduler.block_padding import BlockPadding
from starling.scheduler.block_reuse import BlockReuse
from starling.scheduler.cache_state import CompressedCache
from starling.scheduler.connector_parts import part_of_connector
from starling.scheduler.live_requests import LiveRequests
from starling.scheduler.part import CorePart
from starling.scheduler.plan_chunks import PlanChunks
from starling.scheduler.prefill_limiter import PrefillLimiter
from starling.scheduler.prefix_hits import PrefixHits
from starling.scheduler.provenance import Provenance
from starling.scheduler.split_prompts import SplitPrompts

PARTS: tuple[Callable[[Any, StarlingConfig], CorePart | None], ...] = (
    SplitPrompts.make,  # a step that a split prompt has alone is not divided among long prompts
    PrefixHits.make,
    BlockPadding.make,
    Provenance.make,
    PrefillLimiter.make,
    BlockReuse.make,  # behind those who note a step: for model runner V2 it changes which requests are new
    part_of_connector,
    PlanChunks.make,  # behind all others that bound a chunk
    LiveRequests.make,
    CompressedCache.make,
)
