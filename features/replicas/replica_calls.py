"""Calls of a front by name in the engine core of a replica, by starling.vllm_compat.front.call_engine_core.

Arguments and results are plain numbers, names, bytes, lists and dicts. A call runs between two of the engine's steps.
vLLM sends a result that is a Future once it is there, and the engine makes steps until then.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from starling.features.replicas.worker import close_shards, open_shard
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata, metadata_of
from starling.vllm_compat.core_process import add_core_utility
from starling.vllm_compat.kv_pages import PagePool
from starling.vllm_compat.scheduler_view import SchedulerView

# Hashing the pages of a prompt of a million tokens takes 0.2 s. One thread: more would only wait for one another.
_hashing = ThreadPoolExecutor(1, "starling-page-hashes")


def replica_state(
    scheduler: Any,
    block_hasher: Any,
    token_ids: list[int],
    plan: StarPlan,
    cache_salt: str | None,
    adapter: list[Any] | None = None,
) -> Future[dict[str, Any]]:
    """Return what the replica has cached of a prompt, how busy it is, and the layout of its KV memory.

    The caller, which stands between two steps of the engine, waits for nothing that grows with the prompt: a thread
    hashes the prompt and looks its pages up, while the engine makes steps.

    Args:
        scheduler: the replica's scheduler, with the connector between replicas.
        block_hasher: the engine core's hasher of a request's pages.
        token_ids: the prompt; without any, only the load, the memory and the layout are of use.
        adapter: name, number and path of the LoRA adapter; None: the base model.

    Returns:
        ``cached``: a byte for each star block, 1 where its pages are all in the prefix cache (ReplicaState.cached).
        ``has_anchor``: whether the anchor's pages are.
        ``queued_tokens``: tokens that the replica's requests have yet to compute.
        ``pages``: pages of the replica's KV memory.
        ``layout``: layout of a page (page_transfer.py).
    """
    pool = SchedulerView(scheduler).pool
    unfinished = (request for request in scheduler.requests.values() if not request.is_finished())
    load = {
        "queued_tokens": sum(request.num_tokens - request.num_computed_tokens for request in unfinished),
        "pages": pool.num_pages,
        "layout": scheduler.connector.addresses[0]["layout"],
    }
    params = SamplingParams(max_tokens=1, extra_args={KEY: RequestMetadata(plan=plan).to_wire()})

    lora = None if adapter is None else LoRARequest(*adapter)

    def with_cached_blocks() -> dict[str, Any]:
        try:
            request = Request(
                "starling-look",
                token_ids,
                params,
                None,
                cache_salt=cache_salt,
                lora_request=lora,
                block_hasher=block_hasher,
            )
        except OverflowError:  # since vLLM 0.34, of a token above 32 bits, with which the front refuses the prompt
            return load | _cached_blocks(pool, [], plan, scheduler.block_size)
        return load | _cached_blocks(pool, request.block_hashes, plan, scheduler.block_size)

    return _hashing.submit(with_cached_blocks)


def _cached_blocks(pool: PagePool, page_hashes: list[Any], plan: StarPlan, page_size: int) -> dict[str, Any]:
    """Look up which star blocks of a prompt are cached, beside the engine's steps."""
    cached = np.array(pool.are_cached(page_hashes[: plan.context_end // page_size]), dtype=bool)
    first_pages = [page for border in plan.starts if (page := border // page_size) < len(cached)]
    return {
        "cached": np.logical_and.reduceat(cached, first_pages).tobytes() if first_pages else b"",
        "has_anchor": bool(len(cached)) and bool(cached[: plan.anchor_size // page_size].all()),
    }


REPLICA_STATE = "starling_replica_state"
OPEN_SHARD = "starling_open_shard"
RELEASE = "starling_release"
PING = "starling_ping"


def _replica_state(
    core: Any, token_ids: list[int], plan: dict[str, Any], cache_salt: str | None, adapter: list[Any] | None
) -> Future[dict[str, Any]]:
    hasher = core.request_block_hasher
    return replica_state(core.scheduler, hasher, token_ids, msgspec.convert(plan, StarPlan), cache_salt, adapter)


def _open_shard(core: Any, name: str) -> list[dict[str, Any]]:
    page_ids = core.scheduler.connector.begin_shard(name)
    return core.model_executor.collective_rpc(open_shard, args=(name, page_ids))


def _release(core: Any, names: list[str]) -> None:
    if running := parts_running(core.scheduler, names):
        core.abort_requests(running)  # else they would hold their pages later, for good
    connector = core.scheduler.connector
    opened = sorted(connector.opened_shards.intersection(names))
    if opened:  # an open shard would answer a late query from pages that belong to other requests by then
        core.model_executor.collective_rpc(close_shards, args=(opened,))
    connector.release(names)


def _ping(core: Any) -> None:
    """Answer between two steps."""


def parts_running(scheduler: Any, names: list[str]) -> list[str]:
    """Ids of the requests that would hold pages under these names once they are complete."""
    parts = ((request_id, metadata_of(request).part) for request_id, request in scheduler.requests.items())
    return [request_id for request_id, part in parts if part is not None and part.name in names]


def add_replica_rpc() -> None:
    """Offer these calls in this process's engine core."""
    add_core_utility(REPLICA_STATE, _replica_state)
    add_core_utility(OPEN_SHARD, _open_shard)
    add_core_utility(RELEASE, _release)
    add_core_utility(PING, _ping)
