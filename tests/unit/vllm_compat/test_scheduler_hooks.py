"""The hooks in vLLM's scheduler, where the simulations of tests/unit/scheduler do not reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from starling.vllm_compat.scheduler_view import SchedulerHooks


class WithoutCache:
    """A scheduler of a model without a KV cache, such as an encoder: vLLM makes no group for it."""

    def _get_local_prefix_cache_hit(self, request):
        return KVCacheBlocks(()), 0, 0, False


class Hooked(SchedulerHooks, WithoutCache):
    hooks: ClassVar = {}  # there are no pages to extend: none is called


def test_a_model_without_a_kv_cache_has_no_prefix_hit():
    assert Hooked()._get_local_prefix_cache_hit("request") == (KVCacheBlocks(()), 0, 0, False)


class WithPages:
    """A scheduler that found a page. Since vLLM 0.33 it may be called with the longest hit that it may return."""

    block_size = 16
    kv_cache_manager = SimpleNamespace(create_kv_cache_blocks=KVCacheBlocks)

    def __init__(self):
        pass

    def _get_local_prefix_cache_hit(self, request, max_cache_hit_length=None):
        return KVCacheBlocks((["page"],)), 16, 0, False


class Extending(SchedulerHooks, WithPages):
    __init__ = WithPages.__init__
    hooks: ClassVar = {"kept_boundary": [], "extend_hit": [lambda request, pages, num_tokens: [*pages, "more"]]}


@pytest.mark.parametrize(("limit", "num_tokens"), [((), 32), ((None,), 32), ((16,), 16)], ids=["0.32", "0.33", "limit"])
def test_a_hit_is_extended_unless_vllm_limits_it(limit, num_tokens):
    assert Extending()._get_local_prefix_cache_hit("request", *limit)[1] == num_tokens
