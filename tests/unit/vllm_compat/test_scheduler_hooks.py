"""The hooks in vLLM's scheduler, where the simulations of tests/unit/scheduler do not reach."""

from __future__ import annotations

from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from vllm_compat.scheduler_hooks import SchedulerHooks


class WithoutCache:
    """A scheduler of a model without a KV cache, such as an encoder: vLLM makes no group for it."""

    def _get_local_prefix_cache_hit(self, request):
        return KVCacheBlocks(()), 0, 0, False


class Hooked(SchedulerHooks, WithoutCache):
    def extend_prefix_hit(self, request, pages, num_tokens):
        raise AssertionError("there are no pages to extend")


def test_a_model_without_a_kv_cache_has_no_prefix_hit():
    assert Hooked()._get_local_prefix_cache_hit("request") == (KVCacheBlocks(()), 0, 0, False)
