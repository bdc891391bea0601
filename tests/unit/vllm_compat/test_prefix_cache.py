"""The points of vLLM's prefix cache that Starling hooks; tests/unit/scheduler tests what the hooks do."""

from __future__ import annotations

import inspect

import pytest
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine import core

from starling.vllm_compat import prefix_cache
from starling.vllm_compat.prefix_cache import leave_out_of_hit_rate, use_request_hasher


def test_the_names_that_are_hooked_are_there():
    """A new vLLM that moves one of these fails here first."""
    assert "get_request_block_hasher(" in inspect.getsource(core.EngineCore.__init__)
    parameters = list(inspect.signature(kv_cache_utils.get_request_block_hasher).parameters)
    assert parameters[:2] == ["hash_block_size", "caching_hash_fn"]
    assert parameters[2:] in ([], ["num_hash_lookahead_tokens"])
    for module in (kv_cache_utils, block_pool):
        assert list(inspect.signature(module.generate_block_hash_extra_keys).parameters) == [
            "request",
            "start_token_idx",
            "end_token_idx",
            "start_mm_idx",
        ]
    statistics = inspect.signature(KVCacheManager.record_prefix_cache_stats)
    assert list(statistics.parameters) == ["self", "request", "num_hits"]


@pytest.fixture
def vllms_hasher(monkeypatch):
    monkeypatch.setattr(core, "get_request_block_hasher", lambda *args: ("vllm's", *args))
    monkeypatch.setattr(prefix_cache, "_make_hasher", None)


def test_the_engine_core_that_is_made_next_gets_the_hasher(vllms_hasher):
    use_request_hasher(lambda *args: ("ours", *args))
    assert core.get_request_block_hasher(16, "hash") == ("ours", 16, "hash")
    assert core.get_request_block_hasher(16, "hash", 0) == ("ours", 16, "hash")
    assert core.get_request_block_hasher(16, "hash", 1) == ("vllm's", 16, "hash", 1)  # speculative decoding, vLLM 0.33
    use_request_hasher(None)
    assert core.get_request_block_hasher(16, "hash") == ("vllm's", 16, "hash")


def test_requests_are_left_out_of_the_hit_rate(monkeypatch):
    recorded = []
    monkeypatch.setattr(KVCacheManager, "record_prefix_cache_stats", lambda self, *args: recorded.append(args))
    leave_out_of_hit_rate(lambda request: request == "part")
    manager = object.__new__(KVCacheManager)
    manager.record_prefix_cache_stats("part", 3)
    manager.record_prefix_cache_stats("whole", 4)
    assert recorded == [("whole", 4)]
