"""Turns Starling on for an engine: what its `starling` entry of additional_config says, and what follows.

`starling serve` always makes that entry; plain `vllm serve`, `vllm bench` and `LLM(...)` have it where the
user gives `--additional-config '{"starling": {...}}'`. Without it nothing of vLLM's is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import KVTransferConfig
from vllm.logger import init_logger

from attention_backends.kernels.choose import SETTINGS
from engine_ext import compat, metrics
from engine_ext.refusals import CONNECTOR, fleet, refuse_overlap, star_page, star_refusals
from scheduler.options import OptionError, StarOptions, parse_options
from scheduler.plan import Fleet, check_shards, check_sizes, most_replicas
from scheduler.scheduling_options import SECTION, SchedulingOptions, parse_scheduling
from scheduler.segments import check_marks
from scheduler.share import SHARDS, default_shards
from scheduler.silence import silence_seconds

logger = init_logger("vllm.starling")

ENTRY = "starling"
DEFAULT_SCHEDULING = SchedulingOptions()
CPU_ATTENTION = "cpu_attention"
SECTIONS = ("star", SECTION, CPU_ATTENTION)
MIDDLEWARE = ("engine_ext.serving.plan_header.PlanHeader", "engine_ext.serving.http_progress.HttpProgress")

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "engine_ext.worker.StarCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "engine_ext.worker.StarGPUWorker",
}
SCHEDULER = "scheduler.star_scheduler.StarScheduler"
ASYNC_SCHEDULER = "scheduler.star_scheduler.AsyncStarScheduler"


@dataclass(frozen=True)
class StarlingConfig:
    """The `starling` entry of additional_config.

    Attributes:
        cpu_attention: "auto", or "vllm" for vLLM's own attention op on CPU wherever Starling's is the faster.
    """

    star: StarOptions
    cpu_attention: str = "auto"
    scheduling: SchedulingOptions = DEFAULT_SCHEDULING


def parse_config(additional_config: Any) -> StarlingConfig | None:
    """The parsed entry; None where Starling is not activated.

    Raises:
        OptionError: the entry holds something else than what is allowed.
    """
    if not isinstance(additional_config, Mapping) or ENTRY not in additional_config:
        return None
    entry = additional_config[ENTRY]
    if not isinstance(entry, Mapping):
        raise OptionError(ENTRY, entry, "it must be an object", '{"star": {...}}')
    for key, value in entry.items():
        if key not in SECTIONS:
            raise OptionError(f"{ENTRY}.{key}", value, "there is no such section", ", ".join(SECTIONS))
    star, scheduling = entry.get("star", {}), entry.get(SECTION, {})
    for section, value, example in (
        ("star", star, '{"mode": "auto", ...}'),
        (SECTION, scheduling, '{"fairness": "on", ...}'),
    ):
        if not isinstance(value, Mapping):
            raise OptionError(f"{ENTRY}.{section}", value, "it must be an object", example)
    cpu_attention = entry.get(CPU_ATTENTION, "auto")
    if cpu_attention not in SETTINGS:
        allowed = " or ".join(SETTINGS)
        raise OptionError(f"{ENTRY}.{CPU_ATTENTION}", cpu_attention, "there is no such choice", allowed)
    options = parse_scheduling(scheduling, f"{ENTRY}.{SECTION}.")
    return StarlingConfig(parse_options(star, flat=False), cpu_attention, options)


def before_engine_config(engine_args: Any) -> None:
    """Refuse what does not go together, before vLLM spends time on it (raises ValueError)."""
    if parse_config(engine_args.additional_config) is None:
        return
    for name, value, default in (
        ("scheduler_cls", engine_args.scheduler_cls, None),
        ("worker_cls", engine_args.worker_cls, "auto"),
    ):
        if value != default:
            raise OptionError(name, value, "Starling sets this class itself while it is activated", repr(default))


def after_engine_config(vllm_config: Any) -> None:
    """Put Starling's scheduler and worker in place (raises ValueError where that can't be)."""
    config = parse_config(vllm_config.additional_config)
    if config is None:
        return
    refusals = star_refusals(vllm_config)
    if refusals and config.star.mode != "off":
        raise OptionError("star", config.star.mode, "; ".join(refusals), "off")
    refuse_overlap(vllm_config, config.star.overlap_size)
    check_sizes(config.star, star_page(vllm_config))
    check_marks(config.star, vllm_config.model_config.get_vocab_size())
    replicas = fleet(vllm_config)
    most_replicas(config.star, config.star.overlap_size, replicas)
    check_shards(config.star, config.star.overlap_size, replicas)
    if replicas.size > 1 and replicas.reason is None:
        silence_seconds()  # a wrong setting is told now
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path="engine_ext.star_connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={SHARDS: most_shards(config.star, replicas)},
        )
        compat.divide_kv_memory_check(default_shards)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in WORKERS:
        raise OptionError("worker_cls", parallel.worker_cls, "Starling has no worker for it", ", ".join(WORKERS))
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    scheduling = vllm_config.scheduler_config
    scheduling.scheduler_cls = ASYNC_SCHEDULER if scheduling.async_scheduling else SCHEDULER
    metrics.share_with_workers()
    metrics.front_metrics()
    _say(config.star, refusals, vllm_config.model_config)
    if replicas.reason is not None:
        logger.info("star_replicas: every prompt stays on one of %d replicas: %s", replicas.size, replicas.reason)


def most_shards(star: StarOptions, replicas: Fleet) -> int:
    """Over how many replicas the KV of a prompt may be shared out by default; 1: not at all."""
    if star.shards == "off":
        return 1
    return replicas.size if star.replicas == "auto" else star.replicas


def _say(star: StarOptions, refusals: list[str], model: Any) -> None:
    if refusals:
        logger.warning("Star Attention is not available here: %s", "; ".join(refusals))
        return
    logger.info("Starling is activated; star defaults: %s", star.model_dump())
    if star.mode == "auto" and model.max_model_len < star.min_tokens:
        logger.warning(
            "star=auto never engages: max_model_len=%d is below star_min_tokens=%d",
            model.max_model_len,
            star.min_tokens,
        )


def add_middleware(args: Any) -> None:
    """Let the server that is about to start tell each client the plan it got, and how far its prompt is."""
    if parse_config(args.additional_config) is not None:
        args.middleware = [*args.middleware, *(name for name in MIDDLEWARE if name not in args.middleware)]
