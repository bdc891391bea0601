"""Starling in the engine core's process, which imports this module by the schedulers' names (activation.py)."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from starling.attention_backends.star.refusals import BLOCK_POSITIONS, SPLIT, STAR, star_refusals
from starling.config.entry import config_of
from starling.engine_ext.start import plugin
from starling.features import parts_of_core
from starling.scheduler.planning.request_metadata import REPLICA_CONNECTORS
from starling.scheduler.star_scheduler import StarMixin
from starling.vllm_compat.core_process import send_report
from starling.vllm_compat.scheduler_view import SchedulerView


class FeatureMixin(StarMixin):
    """Mixed into a vLLM scheduler class, before it."""

    feature_parts = parts_of_core()


class StarScheduler(FeatureMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncStarScheduler(FeatureMixin, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""


class DiffusionStarScheduler(FeatureMixin, DiffusionScheduler):
    """For diffusion models, whose canvases of tokens vLLM's scheduler cuts to each request's width."""


class AsyncDiffusionStarScheduler(FeatureMixin, DiffusionAsyncScheduler):
    """For diffusion models in engines with async scheduling."""


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


__all__ = ["AsyncDiffusionStarScheduler", "AsyncStarScheduler", "DiffusionStarScheduler", "StarScheduler"]

logger = init_logger("vllm.starling")

plugin.register()  # vLLM has done so, unless the plugin has failed: then the engine core ends here


def report_of(core: Any) -> dict[str, str | None] | None:
    """Return an engine core's report to its fronts, and log once the problems that the configuration did not show.

    Returns:
        The report, or None for an engine without Starling that runs beside one with it in the user's process.
    """
    if config_of(core.vllm_config) is None:
        return None
    report, config = engine_report(core), core.vllm_config
    if report[STAR] and not star_refusals(config):
        logger.warning("Star Attention is off here, and refused to requests that ask for it: %s", report[STAR])
    transfer = config.kv_transfer_config
    if report[SPLIT] and transfer is not None and transfer.kv_connector in REPLICA_CONNECTORS:
        logger.warning("Every prompt stays on one replica: the KV cache has %s", report[SPLIT])
    return report


send_report(report_of)
