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


class Core:
    """An engine core as far as the utilities between replicas look at it; notes what happens, in order."""

    def __init__(self) -> None:
        self.happened: list[tuple] = []
        self.scheduler = self.connector = self.model_executor = self
        self.opened: set[str] = set()

    def begin_shard(self, name):
        self.opened.add(name)
        return [3, 4]

    def let_go(self, names):
        self.happened.append(("freed", *names))

    def collective_rpc(self, method, args):
        self.happened.append((method, *args))
        return [{"name": "holder"}]


def test_a_shard_is_closed_in_the_workers_before_its_pages_are_free():
    core = Core()
    assert core_utilities._open_shard(core, "a") == [{"name": "holder"}]
    core_utilities._let_go(core, ["a", "b"])
    core.opened.clear()
    core_utilities._let_go(core, ["b"])
    assert core.happened == [("open_shard", "a", [3, 4]), ("close_shards", ["a"]), ("freed", "a", "b"), ("freed", "b")]
