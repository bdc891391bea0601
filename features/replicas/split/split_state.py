"""State of a front for the replicas of its engine: calls, reserved memory, and prompts that are split now."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from vllm.exceptions import RetryableRequestError
from vllm.logger import init_logger

from starling.config.replicas import ReplicaOptions
from starling.features.replicas.split.kv_reservations import KVReservations
from starling.features.replicas.split.replica_rpc import ReplicaRPC
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
        internal_ids: the engine's ids of the requests that were made for parts of prompts.
        releases: calls under way that release what ended requests held on replicas.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        split_metrics()  # the series are there before the first prompt
        self.rpc = ReplicaRPC(options.timeout)
        self.reservations = KVReservations()
        self.split_requests = SplitRequests()
        self.internal_ids: set[str] = set()
        self.releases: set[asyncio.Future] = set()
        self._ends_before_engine = False

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
