"""What an engine core reports to its fronts of Star Attention: what its layers and its KV cache do not allow.

Only workers know on which attention backends the layers of the loaded model run, and only the scheduler knows the
groups of layers in the KV cache. Fronts refuse requests with the reasons (features/*/rules.py).
"""

from __future__ import annotations

from typing import Any

from starling.features.report_fields import BLOCK_POSITIONS, HEADS, HEADS_ORDER, SPLIT, STAR
from starling.vllm_compat.scheduler_view import SchedulerView


def report_of_worker(worker: Any) -> dict[str, str | None]:
    """What a worker's layers can't run, and why, by field; nothing for a worker of vLLM's own."""
    report = getattr(worker, "star_report", None)
    return {} if report is None else report()


def engine_report(core: Any) -> dict[str, str | None]:
    """The report of an engine core whose scheduler is made."""
    view, reports = SchedulerView(core.scheduler), core.model_executor.collective_rpc(report_of_worker)

    def found(name: str) -> list[str]:
        return sorted({report[name] for report in reports if report.get(name) is not None})

    problems, block_problems = found(STAR), found(BLOCK_POSITIONS)
    if view.only_group is None:
        block_problems.append("the KV cache has several groups of layers")
    if view.full_attention_page_size is None:
        problems.append("the full-attention layers have no one KV page size")
    return {
        STAR: "; ".join(problems) or None,
        SPLIT: split_problem(view),
        BLOCK_POSITIONS: "; ".join(block_problems) or None,
        HEADS: "; ".join(found(HEADS)) or None,
        HEADS_ORDER: "; ".join(found(HEADS_ORDER)) or None,
    }


def split_problem(view: SchedulerView) -> str | None:
    """Why the pages of a KV cache can't be exchanged between replicas; None: they can."""
    if view.only_group is not None:
        return None
    number = len(view.groups)
    return f"{number} groups" if number != 1 else "a group that is not full attention, hashed page by page"
