"""Starling in the engine core's process, which imports this module by the schedulers' names (activation.py)."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from starling.attention_backends.star.refusals import SPLIT, STAR, star_refusals
from starling.config.entry import config_of
from starling.engine_ext.engine_report import engine_report
from starling.engine_ext.start import plugin
from starling.features.schedulers import (
    AsyncDiffusionStarScheduler,
    AsyncStarScheduler,
    DiffusionStarScheduler,
    StarScheduler,
)
from starling.scheduler.star.request_metadata import REPLICA_CONNECTORS
from starling.vllm_compat.report_to_fronts import send_report

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
