"""Servers that are peers of one another, for one test each.

The fingerprints of the simulation check every KV page that is read: a wrong page, or one that is no longer held, fails
the step that reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from starling.engine_ext.front.front_state import split_state
from starling.engine_ext.serving.grpc import replica_service
from starling.engine_ext.serving.grpc.replica_service import ReplicaServicer
from starling.engine_ext.serving.grpc.server import Front
from starling.features.replicas.split import end_of_reads, engine_replica, peer_replica, peers
from starling.features.replicas.split.peers import own_identity
from tests.unit.engine_ext.front.peers.pods import KEY, TIMEOUT, Pod, until
from tests.unit.engine_ext.front.simulation import Cluster, serving


@pytest.fixture(scope="module")
def config(make_server_config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        replicas = {"peers": "localhost:1", "timeout": TIMEOUT}
        return make_server_config(additional_config={"starling": {"replicas": replicas}})


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Checks of health come soon, and no limit of time passes on a slow machine."""
    monkeypatch.setattr(engine_replica, "HEALTH_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(replica_service, "HEALTH_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(end_of_reads, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(peer_replica, "STATE_SECONDS", 300)
    for name in ("DESCRIBE_SECONDS", "RESOLVE_SECONDS"):
        monkeypatch.setattr(peers, name, 300)


@pytest.fixture
def run_pods(config):
    """Run a scenario on servers that are peers of one another; at its end every page has to be free."""

    def run(scenario: Callable[..., Awaitable[object]], number: int = 2) -> None:
        async def bounded() -> None:
            cluster, pods = Cluster(number, 100), []
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(number):
                    server = await stack.enter_async_context(serving(config, cluster=cluster))
                    identity = await own_identity(server.engine, split_state(server.engine).rpc)
                    front = Front(
                        server.engine, ["api key"], replica=ReplicaServicer(server.engine, identity), replica_key=KEY
                    )
                    port = await front.start("127.0.0.1:0", None)
                    stack.push_async_callback(front.stop, 0)
                    pods.append(Pod(server, front, f"127.0.0.1:{port}"))
                for pod in pods:
                    await pod.find(",".join(other.address for other in pods))
                await scenario(*pods)
                for pod in pods:
                    await until(lambda pod=pod: not pod.state.releases and not pod.state.split_requests)
                    await until(lambda pod=pod: not pod.replica.scheduler.has_requests())
                    pod.server.check_all_is_free()
                    assert not pod.state.internal_ids
                    assert not pod.server.engine.output_processor.request_states
                    assert pod.server.engine.get_num_unfinished_requests() == 0

        asyncio.run(asyncio.wait_for(bounded(), 600))

    return run
