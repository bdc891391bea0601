"""Starling in the engine core's process, which imports this module by the names of the schedulers (activation.py).

Only workers know on which attention backends a model's layers run. The engine core asks them, and its fronts read the
answer from the KV page size: see the rule of refusals.py about it.
"""

from __future__ import annotations

from typing import Any

from scheduler.star_scheduler import AsyncStarScheduler, StarScheduler
from vllm_compat.config import report_page_size_if

__all__ = ["AsyncStarScheduler", "StarScheduler"]


def lacks_star_layers(worker: Any) -> bool:
    """Whether no layer of a worker can run star rows; False for a worker of vLLM's own."""
    return getattr(worker, "lacks_star_layers", False)


def has_star_layers(core: Any) -> bool:
    """Whether all workers of an engine core have layers that can run star rows."""
    return not any(core.model_executor.collective_rpc(lacks_star_layers))


report_page_size_if(has_star_layers)
