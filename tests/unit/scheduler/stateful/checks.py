"""What must hold of a scheduler between any two calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import RequestStatus

from starling.features.fairness.core import PrefillLimiter
from starling.features.replicas.connector import StarConnector
from starling.features.retention.core import RetainedPages
from starling.features.reuse.core import BlockReuse
from tests.unit.scheduler.stateful.cases import Case
from tests.unit.scheduler.stateful.runner import MARKS, Runner


def check_pages(scheduler: Any, others: Iterable[int]) -> None:
    """Each page is free, or held by live requests as often as its reference count says.

    Args:
        others: ids of the pages that are held beside those of requests, each as often as it is held.
    """
    pool, held = scheduler.kv_cache_manager.block_pool, Counter(others)
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for name, pages in manager.req_to_blocks.items():
            assert not pages or name in scheduler.requests, f"{name} has ended and holds pages"
            held.update(page.block_id for page in pages)
        assert manager.num_cached_block.keys() <= manager.req_to_blocks.keys()
    for _, pages in scheduler.deferred_frees:
        held.update(page.block_id for page in pages)
    for page in pool.blocks:
        if not page.is_null:
            count = held[page.block_id]
            assert page.ref_cnt == count, f"page {page.block_id} is held {count} times, and counts {page.ref_cnt}"
    free = [page.block_id for page in pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == len(set(free)) == pool.get_num_free_blocks()
    assert set(free) == {page.block_id for page in pool.blocks if not page.is_null and not page.ref_cnt}
    part = scheduler.part(RetainedPages)
    retained = part.free.retained if part else {}  # there is none without prefix caching
    assert free[len(free) - len(retained) :] == list(retained), "retained pages are the end of the queue"
    assert 2 * len(retained) <= len(pool.blocks)


def check_queues(scheduler: Any, live: Iterable[str]) -> None:
    """Each live request is in one queue, once, and no other is in any."""
    waiting = [*scheduler.waiting, *scheduler.kv_holding_waiting]
    queued = Counter(request.request_id for request in [*scheduler.running, *waiting])
    assert queued == Counter([*live]), f"queues: {queued}; live requests: {sorted(live)}"
    for request in scheduler.running:
        assert request.status == RequestStatus.RUNNING
    for request in waiting:
        assert request.status != RequestStatus.RUNNING and not request.is_finished()
    for request in scheduler.waiting:
        assert not request.num_computed_tokens, f"{request.request_id} has computed tokens, and holds no pages"
    assert scheduler.deferred_waiting <= set(waiting)
    assert len(scheduler.running) <= scheduler.max_num_active_reqs


class PageKeys:
    """What each page key stands for: the states that a page has under the key."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.states: dict[bytes, np.ndarray] = {}
        self.known: Counter[str] = Counter()

    def learn(self, case: Case) -> None:
        """Take in the keys of a request's pages that are new."""
        size, keys = self.runner.page_size, case.request.block_hashes
        for page in range(self.known[case.name], len(keys)):
            states = case.states[page * size : (page + 1) * size]
            for group, spec in enumerate(self.runner.specs):
                key = make_block_hash_with_group_id(keys[page], group)
                kept = np.full_like(states, states[-1]) if isinstance(spec, MambaSpec) else states
                marked = kept ^ MARKS[group]
                known = self.states.setdefault(key, marked)
                assert np.array_equal(known, marked), f"page {page} of {case.name} has the key of other KV"
        self.known[case.name] = len(keys)

    def check(self, scheduler: Any) -> None:
        """Each page that a prompt can hit was completely written, with the states that its key stands for."""
        pool = scheduler.kv_cache_manager.block_pool
        for page in pool.blocks:
            if page.block_hash is not None:
                assert pool.cached_block_hash_to_block.contain(page.block_hash, page.block_id)
                right = np.array_equal(self.runner.memory[page.block_id], self.states[page.block_hash])
                assert right, f"page {page.block_id} is in the prefix cache without the KV of its key"


def check_empty(scheduler: Any) -> None:
    """Nothing is left of requests that have ended. To be called after the step that reports their end."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    reuse, limiter, retention = map(scheduler.part, (BlockReuse, PrefillLimiter, RetainedPages))
    left = {
        "requests": scheduler.requests,
        "running": scheduler.running,
        "waiting": list(scheduler.waiting),
        "waiting with pages": list(scheduler.kv_holding_waiting),
        "deferred": scheduler.deferred_waiting,
        "finished": scheduler.finished_req_ids,
        "preempted": scheduler.reset_preempted_req_ids,
        "received": scheduler.finished_recving_kv_req_ids | scheduler.failed_recving_kv_req_ids,
        "grammars": scheduler.grammar_compile_error_reqs,
        "prefills": scheduler._inflight_prefills,
        "late frees": scheduler.deferred_frees,
        "encoder inputs": scheduler.encoder_cache_manager.cached,
        "pages": [manager.req_to_blocks for manager in managers if manager.req_to_blocks],
        "hashed": [manager.num_cached_block for manager in managers if manager.num_cached_block],
        "adopting": reuse and (reuse.requests or reuse.unreported),
        "making room": retention and (retention.found or retention.adopted),
        "long prompts": limiter and (limiter.prompts or limiter.cached_tokens or limiter.admission.tokens_before),
    }
    if isinstance(scheduler.connector, StarConnector):
        side = scheduler.connector.connector_scheduler
        left |= {
            "holds": side.holds,
            "users": +side.num_users,
            "later": side.release_later,
            "begun": side._begun,
            "loads": side._loads,
        }
    assert not any(left.values()), {name: value for name, value in left.items() if value}
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not any(page.ref_cnt for page in pool.blocks if not page.is_null)
    assert scheduler.get_num_unfinished_requests() == 0 and not scheduler.has_requests()
