"""What a server's front keeps of the replicas of its engine, and of its peers."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from vllm.exceptions import RetryableRequestError
from vllm.logger import init_logger

from starling.config.replicas import ReplicaOptions
from starling.features.replicas.replica_calls import FORGET_SERVERS
from starling.features.replicas.split.kv_reservations import KVReservations
from starling.features.replicas.split.peers import PeerDirectory
from starling.features.replicas.split.replica_rpc import ReplicaRPC, retrieve_error
from starling.features.replicas.split.split_metrics import split_metrics
from starling.features.replicas.split.split_requests import SplitRequests
from starling.vllm_compat.front import around_shutdown, refuse_admission

logger = init_logger("vllm.starling")


class SplitState:
    """One for each engine.

    Attributes:
        rpc: the calls to the engine's replicas.
        reservations: of their KV memory.
        split_requests: the requests whose prompts are split over replicas now.
        leases: the prompts of other servers of which this one computes parts.
        internal_ids: the engine's ids of the requests that were made for parts of prompts.
        releases: calls under way that release what ended requests, or peers that are gone, held on replicas.
        peers: the servers that this one splits prompts with; None: it has none.
        weights_changed_by: the call by which the weights may have changed since the start; None: by none.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        split_metrics()  # the series are there before the first prompt
        self.rpc = ReplicaRPC(options.timeout)
        self.reservations = KVReservations()
        self.split_requests = SplitRequests()
        self.leases = SplitRequests()
        self.internal_ids: set[str] = set()
        self.releases: set[asyncio.Future] = set()
        self.peers: PeerDirectory | None = None
        self.weights_changed_by: str | None = None
        self._ends_before_engine = False

    def note_weights(self, changed_by: str | None) -> None:
        """Note by which call the engine's weights may have changed; None: by none. Then this server is no peer."""
        if changed_by is None or self.weights_changed_by is not None:
            return
        self.weights_changed_by = changed_by
        if self.peers is not None:
            self.peers.own_problem = f"the weights of this server may have changed since its start, by {changed_by}"
            logger.error("no prompt is split with peers from now on: %s; restart it", self.peers.own_problem)

    def set_peers(self, peers: PeerDirectory) -> None:
        """Split prompts with these servers from now on."""
        self.peers = peers

    def forget_servers(self, engine: Any, servers: list[str]) -> None:
        """Let the engine's workers close their connections to peers that are gone, as soon as it answers."""
        logger.info("connections to servers that are gone are closed: %s", ", ".join(servers))
        call = asyncio.ensure_future(self.rpc.call(engine, 0, FORGET_SERVERS, servers, always=True))
        self.releases.add(call)
        call.add_done_callback(self.releases.discard)
        call.add_done_callback(retrieve_error)

    def let_split_requests_end(self, engine: Any) -> None:
        """When the engine is about to shut down, wait for the split requests as long as it has time.

        An engine core that shuts down takes no more requests and calls, and ends once it has no request, although the
        whole request of a prompt is still to come, or reads its pages. vLLM shuts the engine down in a thread; on the
        event loop's own thread this can't wait.
        """
        if self._ends_before_engine:
            return
        self._ends_before_engine = True
        loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()

        def wait(seconds: float | None) -> None:
            if not seconds or not self.split_requests or threading.get_ident() == loop_thread or not loop.is_running():
                return
            logger.info("Waiting for %d prompts that are split over replicas", len(self.split_requests))
            refuse_admission(engine, lambda: RetryableRequestError("the server is shutting down"))
            ended = asyncio.run_coroutine_threadsafe(self.split_requests.wait_until_ended(seconds), loop)
            if not ended.result():
                logger.warning("Prompts that are split over replicas still run after %.0f s: they are ended", seconds)

        around_shutdown(engine, wait)
