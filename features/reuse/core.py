"""Reuse of star blocks in the engine core, and what is cached of a prompt, which a front may ask for."""

from __future__ import annotations

from typing import Any

from starling.config.entry import StarlingConfig
from starling.features.reuse.block_reuse import BlockReuse
from starling.features.reuse.cached_tokens import cached_tokens
from starling.scheduler.core_rpc import CACHED_TOKENS
from starling.vllm_compat.core_process import add_core_utility


def make(scheduler: Any, config: StarlingConfig) -> BlockReuse | None:
    """Return the part of a scheduler, or None if it reuses no blocks."""
    add_core_utility(CACHED_TOKENS, cached_tokens)
    return BlockReuse.make(scheduler, config)


PARTS = (make,)
