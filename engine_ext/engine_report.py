"""Report of an engine core to its fronts: the parts of Star Attention that its layers and KV cache do not allow.

Only workers know on which attention backends the layers of the loaded model run, and only the scheduler knows the
groups of layers in the KV cache. Fronts refuse requests with the reasons given here (features/*/rules.py).
"""

from __future__ import annotations

from typing import Any

from starling.attention_backends.star.refusals import BLOCK_POSITIONS, SPLIT, STAR
from starling.vllm_compat.scheduler_view import SchedulerView


def report_of_worker(worker: Any) -> dict[str, str | None]:
    """Return why a worker's layers can't run parts of Star Attention, by field; empty for vLLM's own worker."""
    report = getattr(worker, "star_report", None)
    return {} if report is None else report()


def engine_report(core: Any) -> dict[str, str | None]:
    """Return the report of an engine core whose scheduler has been made."""
    view, reports = SchedulerView(core.scheduler), core.model_executor.collective_rpc(report_of_worker)
    fields = {STAR, BLOCK_POSITIONS}.union(*reports)
    problems = {field: sorted({text for report in reports if (text := report.get(field))}) for field in fields}
    if view.only_group is None:
        problems[BLOCK_POSITIONS].append("the KV cache has several groups of layers")
    if view.full_attention_page_size is None:
        problems[STAR].append("the full-attention layers have no one KV page size")
    return {field: "; ".join(texts) or None for field, texts in problems.items()} | {SPLIT: split_problem(view)}


def split_problem(view: SchedulerView) -> str | None:
    """Return why the pages of a KV cache can't be exchanged between replicas, or None if they can."""
    if view.only_group is not None:
        return None
    number = len(view.groups)
    return f"{number} groups" if number != 1 else "a group that is not full attention, hashed page by page"
