"""What a front can ask an engine core, and that vLLM still has the places where it does so."""

from __future__ import annotations

import inspect

import pytest
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

from engine_ext import compat
from scheduler import core_utilities


@pytest.fixture
def added(monkeypatch):
    for name in (core_utilities.CACHE_STATE, core_utilities.PREFILL_PROGRESS, core_utilities.ATTENTION_BACKENDS):
        monkeypatch.setattr(EngineCore, name, None, raising=False)
    for _ in range(2):
        core_utilities.add_core_utilities()


def test_an_engine_core_offers_them(added):
    """Under the core's own names, as it looks utilities up, and with its own count of arguments."""
    core = object.__new__(EngineCoreProc)
    core.scheduler = type("Scheduler", (), {"requests": {}})()
    method = getattr(core, core_utilities.PREFILL_PROGRESS)
    assert method(*EngineCoreProc._convert_msgspec_args(method, [["unknown"]])) == {}


def test_vllms_own_methods_are_not_replaced():
    before = EngineCore.reset_prefix_cache
    with pytest.raises(RuntimeError, match="reset_prefix_cache"):
        compat.add_core_utility("reset_prefix_cache", lambda core: None)
    assert EngineCore.reset_prefix_cache is before


def test_the_names_we_call_are_there():
    """A new vLLM that moves one of these fails here first."""
    assert inspect.iscoroutinefunction(AsyncMPClient.call_utility_all_async)
    assert "call_utility_all_async" in inspect.getsource(DPLBAsyncMPClient.call_utility_async), "the first one's only"
    shutting_down = inspect.getsource(EngineCoreProc._reject_utility_in_shutdown)
    assert f'"{compat.SHUTTING_DOWN}"' in shutting_down
