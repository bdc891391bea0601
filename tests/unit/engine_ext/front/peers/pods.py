"""Servers that are peers: real gRPC between real fronts, over simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starling.config.replicas import ReplicaOptions
from starling.engine_ext.front.front_state import split_state
from starling.engine_ext.serving.grpc.server import Front
from starling.features.replicas.split.peer_replica import PeerReplica
from starling.features.replicas.split.peers import PeerDirectory, own_identity
from starling.scheduler.star.request_metadata import KEY as METADATA
from tests.unit.engine_ext.front.simulation import STAR, Server

KEY = "the key of the peers"
TIMEOUT = 30
ADDRESS = {"name": "x", "metadata": b"", "bases": [], "device": 0, "holds": 0, "layout": {"dtype": "float32"}}
AUTO = {name: value for name, value in STAR.items() if name != "star_replicas"}


class Pod:
    """One server with its gRPC front, as `starling serve` makes them."""

    def __init__(self, server: Server, front: Front, address: str) -> None:
        self.server, self.front, self.address = server, front, address
        self.state = split_state(server.engine)

    @property
    def replica(self):
        return self.server.replicas[0]

    async def find(self, entries: str, key: str = KEY, credentials=None) -> PeerDirectory:
        """Look for peers once, and use them."""
        options = ReplicaOptions(peers=entries, timeout=TIMEOUT)
        found = PeerDirectory(options, await own_identity(self.server.engine, self.state.rpc), key, credentials)
        await found.refresh()
        self.state.set_peers(found)
        return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.01)


async def held_by(pod: Pod) -> None:
    """Wait until a pod holds pages for another one."""
    await until(lambda: pod.replica.held)


def session_of(pod: Pod) -> PeerReplica:
    """The call to a pod's one peer, for its one prompt."""
    return pod.state.split_requests._requests[0].replicas[1]


def stop_before_the_whole_request(pod: Pod) -> None:
    """Stop a pod's engine when the front hands it a request that fetches pages, before it takes the request in."""
    add_request = pod.server.client.add_request_async

    async def stop_and_add(request) -> None:
        if "fetch" in request.sampling_params.extra_args.get(METADATA, ()):
            pod.replica.running.clear()
        await add_request(request)

    pod.server.client.add_request_async = stop_and_add
