"""Rules that keep a prompt on one replica, and its KV together."""

from __future__ import annotations

import os
from typing import Any

from vllm import envs

from starling.attention_backends.star.refusals import (
    CPU_ATTENTION_RULES,
    RULES,
    SPLIT,
    Rule,
    has_library,
    reasons,
    reported,
)
from starling.features.replicas.notifications import nixl_problem
from starling.scheduler.planning.facts import ReplicaSet, dependence
from starling.scheduler.planning.request_metadata import OWN_CONNECTORS
from starling.vllm_compat.config import num_api_servers


def _other_connector(config: Any) -> str | None:
    transfer = config.kv_transfer_config
    return None if transfer is None or transfer.kv_connector in OWN_CONNECTORS else transfer.kv_connector


def _moves_kv_memory(config: Any) -> bool:
    """As vLLM's own check of KV connectors; it runs before Starling sets its connector."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    on_cpu = config.device_config.device_type == "cpu"
    return "expandable_segments:True" in settings and not config.model_config.enable_cumem_allocator and not on_cpu


def other_launcher(parallel: Any) -> str | None:
    """Return what starts the engines' processes, perhaps on other hosts, or None if vLLM does."""
    if parallel.data_parallel_backend != "mp":
        return parallel.data_parallel_backend
    executor = parallel.distributed_executor_backend
    return None if executor in ("mp", "uni") else str(executor)


SPLIT_RULES: tuple[Rule, ...] = (
    Rule(lambda c: dependence(c.model_config), "the model's star blocks depend on one another"),
    Rule(
        lambda c: not c.cache_config.enable_prefix_caching,
        "replicas exchange pages of their prefix caches, which are off",
    ),
    Rule(_other_connector, "an engine has one KV connector, and --kv-transfer-config gives it another"),
    Rule(
        lambda c: c.parallel_config.data_parallel_external_lb or c.parallel_config.data_parallel_hybrid_lb,
        "with an external load balancer a front reaches some of the replicas only",
    ),
    Rule(
        lambda c: envs.VLLM_DP_SIZE > 1,
        "VLLM_DP_SIZE: each process of vLLM's offline data parallelism reaches its own replica only",
    ),
    Rule(
        lambda c: other_launcher(c.parallel_config),
        "replicas that vLLM does not start itself may be on hosts whose network devices are not known",
    ),
    Rule(lambda c: c.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism divides the layers of a page"),
    Rule(
        lambda c: c.parallel_config.enable_elastic_ep, "elastic expert parallelism changes the replicas while it runs"
    ),
    Rule(
        lambda c: c.parallel_config.enable_fault_tolerance,
        "--enable-fault-tolerance ends an engine's requests and goes on with it: what others hold is not known",
    ),
    Rule(
        lambda c: c.speculative_config, "speculative decoding: the KV of a part's last token depends on the next part"
    ),
    Rule(lambda c: c.model_config.enable_sleep_mode, "sleep mode frees the KV memory that NIXL has registered"),
    Rule(
        _moves_kv_memory,
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may move the KV memory that NIXL has registered",
    ),
    Rule(lambda c: c.aux_output_config.enabled, "outputs beside tokens exist on the replica that computed them only"),
    Rule(reported(SPLIT), "replicas exchange the pages of one group of layers, and the engine has other ones"),
    Rule(
        lambda c: nixl_problem(), "the NIXL library, which moves KV pages, can't be imported: pip install nixl==1.5.1"
    ),
)

SHARD_RULES: tuple[Rule, ...] = (
    Rule(has_library, "a library may keep what is computed in a step in which a replica with other KV is lost"),
    Rule(
        lambda c: c.device_config.device_type != "cpu",
        "attention that returns its log-sum-exp is available on CPU only",
    ),
    Rule(
        lambda c: c.cache_config.cache_dtype.startswith("fp8"),
        "replicas exchange queries in the dtype of the KV cache, which for fp8 would round them",
    ),
    *CPU_ATTENTION_RULES,
    Rule(
        lambda c: num_api_servers(c) > 1,
        "each of several API servers (--api-server-count) would reserve the same KV memory for its prompts",
    ),
    Rule(
        lambda c: c.scheduler_config.async_scheduling,
        "async scheduling: a step begins before it is known whether all replicas answered in the last one",
    ),
)


def replica_set(vllm_config: Any) -> ReplicaSet:
    """Return the server's replicas, and why a prompt can't be split over them, or its KV can't stay there."""
    size = vllm_config.parallel_config.data_parallel_size
    refusals = list(reasons(RULES + SPLIT_RULES, vllm_config)) if size > 1 else []
    shards_refusal = None if size == 1 or refusals else next(reasons(SHARD_RULES, vllm_config), None)
    return ReplicaSet(size, "; ".join(refusals) or None, shards_refusal)
