"""What an engine core reports to its fronts of Star Attention: what its layers and its KV cache do not allow.

Only workers know on which attention backends the layers of the loaded model run, and only the scheduler knows the
groups of layers in the KV cache. Fronts refuse requests with the reasons (refusals.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from starling.vllm_compat.scheduler_view import SchedulerView

STAR, SPLIT, BLOCK_POSITIONS, HEADS, HEADS_ORDER = "star", "split", "block_positions", "heads", "heads_order"
"""The fields of a report: why no prompt can run star, be split over replicas, have blocks with positions of their own,
or heads that see everything; None: it can. The last one is the order of the heads' scores that the workers have."""


def problem_of(worker: Any, name: str) -> str | None:
    """What a worker's layers can't run, and why (engine_ext/worker/star_worker.py); None for a worker of vLLM's own."""
    return getattr(worker, name, None)


def engine_report(core: Any) -> dict[str, str | None]:
    """The report of an engine core whose scheduler is made."""
    view = SchedulerView(core.scheduler)

    def found(name: str) -> list[str]:
        return sorted(set(core.model_executor.collective_rpc(partial(problem_of, name=name))) - {None})

    problems, block_problems = found("star_problem"), found("block_positions_problem")
    if view.only_group is None:
        block_problems.append("the KV cache has several groups of layers")
    if view.full_attention_page_size is None:
        problems.append("the full-attention layers have no one KV page size")
    return {
        STAR: "; ".join(problems) or None,
        SPLIT: split_problem(view),
        BLOCK_POSITIONS: "; ".join(block_problems) or None,
        HEADS: "; ".join(found("heads_problem")) or None,
        HEADS_ORDER: "; ".join(found("heads_order")) or None,
    }


def split_problem(view: SchedulerView) -> str | None:
    """Why the pages of a KV cache can't be exchanged between replicas; None: they can."""
    if view.only_group is not None:
        return None
    number = len(view.groups)
    return f"{number} groups" if number != 1 else "a group that is not full attention, hashed page by page"
