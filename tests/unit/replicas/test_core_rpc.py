"""The calls between a front and the engine core of a replica."""

from __future__ import annotations

from vllm.v1.engine.core import EngineCore, EngineCoreProc

from starling.features.replicas import replica_calls
from starling.features.replicas.worker import close_shards, open_shard


class Core:
    """An engine core as far as the calls look at it; records what happens, in order."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.scheduler = self.connector = self.model_executor = self
        self.opened_shards: set[str] = set()
        self.requests = {}

    def begin_shard(self, name):
        self.opened_shards.add(name)
        return [3, 4]

    def release(self, names):
        self.events.append(("release", *names))
        self.opened_shards.clear()

    def collective_rpc(self, method, args):
        self.events.append((method, *args))
        return [{"name": "server"}]


def test_a_shard_is_closed_in_the_workers_before_its_pages_are_free():
    core = Core()
    assert replica_calls._open_shard(core, "a") == [{"name": "server"}]
    replica_calls._release(core, ["a", "b"])
    replica_calls._release(core, ["b"])
    assert core.events == [
        (open_shard, "a", [3, 4]),
        (close_shards, ["a"]),
        ("release", "a", "b"),
        ("release", "b"),
    ]


def test_an_engine_core_offers_the_calls(monkeypatch):
    for name in (replica_calls.REPLICA_STATE, replica_calls.OPEN_SHARD, replica_calls.RELEASE, replica_calls.PING):
        monkeypatch.setattr(EngineCore, name, None, raising=False)
    for _ in range(2):
        replica_calls.add_replica_rpc()
    core = object.__new__(EngineCoreProc)
    core.scheduler = core.model_executor = Core()
    method = getattr(core, replica_calls.OPEN_SHARD)
    assert method(*EngineCoreProc._convert_msgspec_args(method, ["a"])) == [{"name": "server"}]
