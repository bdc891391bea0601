"""What a replica says about a prompt: asked through vLLM's engine core, compared with the keys of vLLM's requests."""

from __future__ import annotations

import queue
import threading

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import init_none_hash, make_block_hash_with_group_id
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from starling.features.replicas.replica_calls import REPLICA_STATE, add_replica_rpc, replica_state
from starling.scheduler.cache_keys import independent_block_hasher
from starling.scheduler.planning.plan import StarPlan
from starling.vllm_compat.prefix_cache import plain_request_hasher
from tests.unit.replicas.test_connector import PLAN, scheduler, tokens  # noqa: F401
from tests.unit.scheduler.simulation import HASH, PAGE_SIZE, make_request
from tests.unit.scheduler.test_star_scheduler import config  # noqa: F401

SECONDS = 300
"""Within which a thread goes on, on any machine."""


def engine_core(scheduler, hasher) -> EngineCoreProc:  # noqa: F811
    """vLLM's engine core as far as it answers calls."""
    add_replica_rpc()
    core = object.__new__(EngineCoreProc)
    core.scheduler, core.request_block_hasher = scheduler, hasher
    core.output_queue, core.shutdown_state = queue.Queue(), EngineShutdownState.RUNNING
    return core


def test_the_engine_goes_on_while_a_prompt_is_hashed(scheduler):  # noqa: F811
    on_steps_thread = []
    may_hash = threading.Event()

    def hasher(request):
        on_steps_thread.append(threading.current_thread() is threading.main_thread())
        if not on_steps_thread[-1]:
            assert may_hash.wait(SECONDS)
        return independent_block_hasher(PAGE_SIZE, HASH)(request)

    core = engine_core(scheduler, hasher)
    # As the front sends it, once encoded for all replicas.
    encoded = msgspec.Raw(msgspec.msgpack.encode(list(tokens())))
    call = MsgpackEncoder().encode((0, 7, REPLICA_STATE, (encoded, msgspec.to_builtins(PLAN), None, None)))
    core._handle_client_request(EngineCoreRequestType.UTILITY, MsgpackDecoder().decode(call))
    assert not any(on_steps_thread), "the prompt is hashed between two steps"
    assert core.output_queue.empty()
    may_hash.set()
    client, answer = core.output_queue.get(timeout=SECONDS)
    outputs = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(answer))
    assert (client, outputs.utility_output.call_id) == (0, 7)
    assert outputs.utility_output.failure_message is None
    assert outputs.utility_output.result.result["cached"] == bytes(5)


def test_the_caller_gets_the_error_of_the_thread(scheduler):  # noqa: F811
    def hasher(request):
        raise KeyError("no hash")

    core = engine_core(scheduler, hasher)
    core._handle_client_request(
        EngineCoreRequestType.UTILITY, (0, 8, REPLICA_STATE, (tokens(), msgspec.to_builtins(PLAN), None, None))
    )
    _, outputs = core.output_queue.get(timeout=SECONDS)
    assert "no hash" in outputs.utility_output.failure_message


@pytest.mark.parametrize("make_hasher", [independent_block_hasher, plain_request_hasher])
@pytest.mark.parametrize("name", ["sha256", "sha256_cbor"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_cached_blocks_are_those_that_a_request_would_find(scheduler, make_hasher, name, data):  # noqa: F811
    """The pages of vLLM's request are in the pool, each or not, and twice some of them: which blocks are whole?"""
    hash_function = get_hash_fn_by_name(name)
    init_none_hash(hash_function)  # it is the parent of each first page
    hasher = make_hasher(PAGE_SIZE, hash_function)
    block_pages = data.draw(st.integers(1, 3))
    ids = data.draw(st.lists(st.integers(0, 200), min_size=(block_pages + 1) * PAGE_SIZE, max_size=10 * PAGE_SIZE))
    anchor_pages = data.draw(st.integers(0, block_pages))
    context_end = data.draw(st.integers(block_pages * PAGE_SIZE + 1, len(ids) - 1))
    plan = StarPlan(block_pages * PAGE_SIZE, anchor_pages * PAGE_SIZE, 0, context_end, len(ids), 2)
    salt = data.draw(st.sampled_from([None, "tenant"]))
    request = make_request("any", plan, ids, cache_salt=salt)
    request.block_hashes, request._block_hasher = [], hasher
    request.update_block_hashes()
    hashes = request.block_hashes
    copies = data.draw(st.lists(st.sampled_from([0, 1, 1, 2]), min_size=len(hashes), max_size=len(hashes)))
    block_pool = scheduler.kv_cache_manager.block_pool
    assert block_pool.reset_prefix_cache()
    pages = iter(block_pool.blocks[1:])
    for page_hash, number in zip(hashes, copies, strict=True):
        for _ in range(number):
            block_pool.cached_block_hash_to_block.insert(make_block_hash_with_group_id(page_hash, 0), next(pages))
    found = [block_pool.get_cached_block(page_hash, [0]) is not None for page_hash in hashes]
    whole = found[: context_end // PAGE_SIZE]
    state = replica_state(scheduler, hasher, ids, plan, salt).result()
    assert state["cached"] == bytes(
        all(whole[first : first + block_pages]) for first in range(0, len(whole), block_pages)
    )
    assert state["has_anchor"] == all(found[:anchor_pages])
    init_none_hash(HASH)
