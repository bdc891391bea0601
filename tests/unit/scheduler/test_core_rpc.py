"""The calls from a front to an engine core, and the vLLM code that they depend on."""

from __future__ import annotations

import inspect

import pytest
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

from starling.scheduler import cache_state
from starling.vllm_compat.core_process import add_core_utility
from starling.vllm_compat.front import SHUTTING_DOWN


@pytest.fixture
def added(monkeypatch):
    for name in (
        cache_state.CACHE_STATE,
        cache_state.PREFILL_PROGRESS,
        cache_state.ATTENTION_BACKENDS,
        cache_state.LIVE_REQUESTS,
    ):
        monkeypatch.setattr(EngineCore, name, None, raising=False)
    for _ in range(2):
        cache_state.add_core_rpc()


def test_an_engine_core_offers_these_calls(added):
    """A call is found by its name, and takes the arguments that the engine core passes."""
    core = object.__new__(EngineCoreProc)
    core.scheduler = type("Scheduler", (), {"requests": {}})()
    method = getattr(core, cache_state.PREFILL_PROGRESS)
    assert method(*EngineCoreProc._convert_msgspec_args(method, [["unknown"]])) == {}


def test_vllms_own_methods_are_not_replaced():
    before = EngineCore.reset_prefix_cache
    with pytest.raises(RuntimeError, match="reset_prefix_cache"):
        add_core_utility("reset_prefix_cache", lambda core: None)
    assert EngineCore.reset_prefix_cache is before


def test_vllm_has_the_names_that_the_calls_use():
    """The test fails if a new vLLM renames or moves one of these names."""
    assert inspect.iscoroutinefunction(AsyncMPClient.call_utility_all_async)
    assert "call_utility_all_async" in inspect.getsource(DPLBAsyncMPClient.call_utility_async), (
        "it returns the first engine core's result"
    )
    shutting_down = inspect.getsource(EngineCoreProc._reject_utility_in_shutdown)
    assert f'"{SHUTTING_DOWN}"' in shutting_down
