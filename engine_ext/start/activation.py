"""Activation of Starling for an engine that has a `starling` entry in additional_config.

`starling serve` always makes that entry; plain `vllm serve`, `vllm bench` and `LLM(...)` have it if the user gives
`--additional-config '{"starling": {...}}'`. Without the entry nothing of vLLM is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm.config import KVTransferConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from starling.attention_backends.paged import CLASSES, NAME
from starling.attention_backends.star.model_heads import scores_of
from starling.attention_backends.star.refusals import has_dense_heads
from starling.config.entry import (
    ADMIN_KEY_ENV,
    CACHE_SALT,
    ENTRY,
    GPU_ATTENTION,
    LIVE_DATA,
    LIVE_PAGE,
    LIVE_PATH,
    PRESET,
    STAR_HEADS,
    Entries,
    StarlingConfig,
    config_of,
    parse_config,
    preset_of,
    refuse_rust_front,
    with_preset,
)
from starling.config.parsing import OptionError
from starling.config.star import StarOptions, summary
from starling.engine_ext.front.cache_salt import api_keys
from starling.engine_ext.front.observability import front_metrics
from starling.engine_ext.front.planning import engine_facts, refuse_segment_text, star_page_size
from starling.engine_ext.start.library_connector import beside_library, set_library
from starling.features.adapter.lora import check_adapter, turn_lora_on
from starling.features.replicas import network
from starling.features.replicas.rules import other_launcher
from starling.scheduler.planning.facts import EngineFacts, ReplicaSet
from starling.scheduler.planning.request_metadata import CONNECTOR, ONE_HOST, SHARDS, default_num_shards
from starling.scheduler.planning.rules import check_defaults
from starling.vllm_compat.config import default_memory_share, is_async_engine, share_memory_nodes
from starling.vllm_compat.core_process import divide_kv_memory_check, end_children_with_parent, receive_reports
from starling.vllm_compat.cpu_lora import compile_with_lora
from starling.vllm_compat.metrics import collect_from_children

logger = init_logger("vllm.starling")

HTTP = "starling.engine_ext.serving.http"
MIDDLEWARE = (  # the last one is the outermost
    f"{HTTP}.middleware.DescribeApi",
    f"{HTTP}.body.BoundBody",
    f"{HTTP}.middleware.PlanHeader",
    f"{HTTP}.middleware.HttpProgress",
    f"{HTTP}.middleware.AnswerCachedTokens",
    f"{HTTP}.middleware.NoteClient",
    f"{HTTP}.middleware.RequireKey",
)
PAGE_MIDDLEWARE = f"{HTTP}.live_page.LivePage"
OUTERMOST = f"{HTTP}.middleware.EndWithEngine"

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "starling.engine_ext.worker.star_worker.StarCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "starling.engine_ext.worker.star_worker.StarGPUWorker",
}
CORE = "starling.engine_ext.engine_core"
SCHEDULERS = {
    "vllm.v1.core.sched.scheduler.Scheduler": f"{CORE}.StarScheduler",
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": f"{CORE}.AsyncStarScheduler",
    "vllm.v1.core.sched.diffusion_scheduler.DiffusionScheduler": f"{CORE}.DiffusionStarScheduler",
    "vllm.v1.core.sched.diffusion_scheduler.DiffusionAsyncScheduler": f"{CORE}.AsyncDiffusionStarScheduler",
}


def before_engine_config(engine_args: Any) -> None:
    """Refuse options that exclude one another, before vLLM makes its configuration.

    Raises:
        OptionError: Starling is activated beside a scheduler or worker class of the user's, or beside a front that
            would not call it; or its entry is wrong.
    """
    config = parse_config(engine_args.additional_config)
    if config is None:
        return
    if is_async_engine(engine_args):
        refuse_rust_front(os.environ)
    if config.cache_salt != "request" and not is_async_engine(engine_args):
        raise OptionError(f"{ENTRY}.{CACHE_SALT}", config.cache_salt, "only a server has clients", "request")
    if config.live_page != "off" and not is_async_engine(engine_args):
        raise OptionError(f"{ENTRY}.{LIVE_PAGE}", config.live_page, "only a server has a page", "off")
    for name, value, default in (
        ("scheduler_cls", engine_args.scheduler_cls, None),
        ("worker_cls", engine_args.worker_cls, "auto"),
    ):
        if value != default:
            raise OptionError(name, value, "Starling sets this class itself while it is activated", repr(default))
    if config.gpu_attention in CLASSES:
        choose_gpu_attention(config.gpu_attention, engine_args)
    leave_memory_for_steps(engine_args)
    use_preset(engine_args)
    turn_lora_on(config, engine_args)
    if engine_args.enable_lora and current_platform.is_cpu():
        compile_with_lora(lambda vllm_config: config_of(vllm_config) is not None)


def leave_memory_for_steps(engine_args: Any) -> None:
    """Leave GPU memory free if vLLM would give the KV cache all that its warm-up leaves (since vLLM 0.34).

    The warm-up has no star step, which takes memory of its own (``unprofiled_memory`` of `starling doctor`).
    """
    if current_platform.device_type == "cuda" and engine_args.gpu_memory_utilization is None:
        share = engine_args.gpu_memory_utilization = default_memory_share()
        logger.info("--gpu-memory-utilization %g: star steps take memory that vLLM's warm-up does not measure", share)


def use_preset(engine_args: Any) -> None:
    """Set the size of a KV page that a preset asks for, and log the options that the preset stands for."""
    entry = engine_args.additional_config[ENTRY]
    preset = preset_of(entry, f"{ENTRY}.{PRESET}")
    if preset is None:
        return
    if preset.cpu_page and current_platform.is_cpu() and engine_args.block_size is None:
        engine_args.block_size = preset.cpu_page
    own = f", --block-size {engine_args.block_size}" if engine_args.block_size is not None else ""
    options = with_preset(entry, f"{ENTRY}.{PRESET}")
    logger.info("preset %s: %s%s", entry[PRESET], ", ".join(f"{key}={options[key]}" for key in options), own)


def choose_gpu_attention(setting: str, engine_args: Any) -> None:
    """Let the layers of an engine run Starling's kernels (raises OptionError)."""
    given = engine_args.attention_backend or engine_args.attention_config.backend
    if given is not None:
        name = getattr(given, "name", given)
        raise OptionError(
            f"{ENTRY}.{GPU_ATTENTION}", setting, f"--attention-backend {name} is given too", "one of both"
        )
    if current_platform.device_type != "cuda":
        reason = f"the engine runs on {current_platform.device_type}, and these kernels on NVIDIA GPUs"
        raise OptionError(f"{ENTRY}.{GPU_ATTENTION}", setting, reason, "vllm")
    engine_args.attention_backend = AttentionBackendEnum[NAME]


def after_engine_config(vllm_config: Any) -> None:
    """Set Starling's scheduler, worker and KV connector in an activated engine's configuration.

    Raises:
        OptionError: the options can't be used with this engine.
    """
    config = config_of(vllm_config)
    if config is None:
        return
    set_library(config, vllm_config)
    facts = engine_facts(vllm_config, star_page_size(vllm_config))
    scores_of(vllm_config)  # looks at the model's files now, and not at the first request
    if config.star_heads is not None and has_dense_heads(vllm_config) and facts.heads_refusals:
        reason = "; ".join(facts.heads_refusals)
        raise OptionError(f"{ENTRY}.{STAR_HEADS}", config.star_heads, reason, "a server without it")
    check_defaults(config.star, facts)
    check_adapter(config, vllm_config, facts)
    refuse_segment_text(config.star.segments, vllm_config.model_config)
    share_memory_nodes(vllm_config, os.environ)
    one_host = is_one_host(vllm_config.parallel_config)
    if one_host:
        network.keep_gloo_on_loopback(os.environ)
    replicas = facts.replicas
    if replicas.size > 1 and replicas.split_refusal is None:
        if vllm_config.parallel_config.data_parallel_size_local:  # else this front's replicas are all on other hosts
            check_network(one_host)
        transfer = KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path="starling.features.replicas.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={SHARDS: max_shards(config.star, replicas), ONE_HOST: one_host},
        )
        vllm_config.kv_transfer_config = beside_library(transfer, vllm_config.kv_transfer_config)
        divide_kv_memory_check(default_num_shards)
    end_children_with_parent()
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    parallel.worker_cls = star_class("worker_cls", parallel.worker_cls, WORKERS)
    chosen = scheduling.get_scheduler_cls()
    scheduling.scheduler_cls = star_class("scheduler_cls", f"{chosen.__module__}.{chosen.__qualname__}", SCHEDULERS)
    receive_reports()
    collect_from_children()
    front_metrics()
    preset = vllm_config.additional_config[ENTRY].get(PRESET)
    if [*vllm_config.additional_config] == [ENTRY]:
        vllm_config.additional_config = Entries(vllm_config.additional_config)
    _log_activation(config.star, facts, vllm_config.model_config, preset)
    if replicas.split_refusal is not None:
        reason = replicas.split_refusal
        logger.info("star_replicas: every prompt stays on one of %d replicas: %s", replicas.size, reason)


def star_class(option: str, chosen: str, known: Mapping[str, str]) -> str:
    """Return the name of Starling's form of the class that vLLM has chosen.

    Raises:
        OptionError: Starling has no form of it.
    """
    if chosen not in known:
        raise OptionError(option, chosen, "vLLM has chosen this class, of which Starling has no form", ", ".join(known))
    return known[chosen]


def is_one_host(parallel: Any) -> bool:
    """Return whether all replicas, and all ranks of each, are processes that vLLM starts on this host."""
    local = parallel.data_parallel_size_local == parallel.data_parallel_size
    return local and parallel.nnodes == 1 and other_launcher(parallel) is None


def check_network(one_host: bool) -> None:
    """Refuse replicas on several hosts if the network device by which they are reached is not known.

    Raises:
        OptionError: the device is not known.
    """
    try:
        network.devices(one_host, os.environ)
    except network.NetworkError as error:
        reason = (
            f"{error}, and replicas on several hosts exchange KV pages. A peer that reaches the ports of these "
            "transfers can write the workers' memory, so they are opened on a device that is named only"
        )
        allowed = (
            f"this host's address in a network that only the replicas reach, or the name of a device in "
            f"{network.DEVICES_ENV}"
        )
        raise OptionError(network.ADDRESS_ENV, os.environ.get(network.ADDRESS_ENV), reason, allowed) from None


def max_shards(star: StarOptions, replicas: ReplicaSet) -> int:
    """Return the number of replicas over which a prompt's KV may be divided by default; 1 if it is not divided."""
    if star.shards == "off":
        return 1
    return replicas.size if star.replicas == "auto" else star.replicas


def _log_activation(star: StarOptions, facts: EngineFacts, model: Any, preset: str | None) -> None:
    if facts.refusals:
        logger.warning("Star Attention is not available here: %s", "; ".join(facts.refusals))
        return
    if star.says_where_documents_start and facts.document_refusals:
        logger.warning("star_segments=%s has no effect here: %s", star.segments, "; ".join(facts.document_refusals))
    logger.info("Starling: %s", summary(star))
    if star.mode == "auto" and model.max_model_len < star.min_tokens:
        logger.warning(
            "No prompt will be star: star_min_tokens=%d%s is above max_model_len=%d. Give --star-min-tokens %d",
            star.min_tokens,
            f" of preset {preset}" if preset else "",
            model.max_model_len,
            model.max_model_len // 4,
        )


def prepare_server(args: Any) -> None:
    """Add Starling's middleware to the arguments of a server that is about to start.

    Raises:
        OptionError: the server's cache salts would come from API keys, and it has none.
    """
    config = parse_config(args.additional_config)
    if config is None or getattr(args, "headless", False):  # a host without a front
        return
    if config.cache_salt == "api-key" and not api_keys(args):
        reason = "the server has no API keys to derive salts from: give --api-key or VLLM_API_KEY"
        raise OptionError(f"{ENTRY}.{CACHE_SALT}", config.cache_salt, reason, "request or required")
    if config.star.says_where_documents_start:
        show_cached_tokens(args, config)
    wanted = [*MIDDLEWARE]
    if config.live_page == "on":
        wanted.append(PAGE_MIDDLEWARE)
        prepare_live_page(args, config)
    wanted.append(OUTERMOST)
    args.middleware = [*args.middleware, *(name for name in wanted if name not in args.middleware)]


def show_cached_tokens(args: Any, config: StarlingConfig) -> None:
    """Let responses say how much was cached: with documents, the time to the first token reveals it anyway."""
    args.enable_prompt_tokens_details = True
    if len(api_keys(args)) > 1 and config.cache_salt == "request":
        logger.warning_once(
            "star_segments=%s: clients share cached documents, and responses say which were cached. With "
            "--cache-salt api-key each API key has its own.",
            config.star.segments,
        )


def prepare_live_page(args: Any, config: StarlingConfig) -> None:
    """Check who could see the live page, and keep its requests, one a second, out of the access log.

    Raises:
        OptionError: clients that must not learn of one another would see one another's requests.
    """
    has_admin_key = bool(os.environ.get(ADMIN_KEY_ENV))
    if config.cache_salt != "request" and not has_admin_key:
        reason = f"with {CACHE_SALT}={config.cache_salt} clients must not learn of one another, and the page shows all"
        raise OptionError(f"{ENTRY}.{LIVE_PAGE}", "on", reason, f"off, or set {ADMIN_KEY_ENV}: the page then needs it")
    quiet = [path for path in (args.disable_access_log_for_endpoints or "").split(",") if path]
    if LIVE_DATA not in quiet:
        args.disable_access_log_for_endpoints = ",".join([*quiet, LIVE_DATA])
    if has_admin_key:
        who = "who has the admin key"
    else:
        who = "who has the API key" if api_keys(args) else "everyone who reaches the HTTP port"
    logger.info("The page %s shows the requests to %s", LIVE_PATH, who)
