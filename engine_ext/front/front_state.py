"""What Starling keeps of one engine in a front's process."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.exceptions import RetryableRequestError
from vllm.logger import init_logger

from starling.config.replicas import ReplicaOptions
from starling.engine_ext.front.kv_reservations import KVReservations
from starling.engine_ext.front.peers import PeerDirectory
from starling.engine_ext.front.progress import ProgressPoller
from starling.engine_ext.front.replica_rpc import ReplicaRPC, retrieve_error
from starling.engine_ext.front.requests import RequestPlanner
from starling.engine_ext.front.split_requests import SplitRequests
from starling.features.replicas.replica_calls import FORGET_SERVERS
from starling.vllm_compat.front import around_shutdown, refuse_admission

logger = init_logger("vllm.starling")

LOOKUPS = 4
"""Prompts that are looked up at once (look_up.py): each takes milliseconds of an engine's process."""


class FrontState:
    """One for each engine.

    Attributes:
        planner: plans the engine's requests.
        split_requests: the requests whose prompts are split over replicas now.
        leases: the prompts of other servers of which this one computes parts.
        internal_ids: the engine's ids of the requests that Starling made for parts of prompts.
        releases: calls under way that release what ended requests, or peers that are gone, held on replicas.
        peers: the servers that this one splits prompts with; None: it has none.
        weights_changed_by: the call by which the weights may have changed since the start; None: by none.
        serving_models: returns vLLM's list of the server's models; None where no OpenAI server uses the engine.
        lookups: the turns of prompts that are looked up.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.planner = RequestPlanner(vllm_config, tokenizer)
        config = self.planner.config
        self.replica_rpc = ReplicaRPC((config.replicas if config else ReplicaOptions()).timeout)
        self.reservations = KVReservations()
        self.split_requests = SplitRequests()
        self.leases = SplitRequests()
        self.internal_ids: set[str] = set()
        self.releases: set[asyncio.Future] = set()
        self.peers: PeerDirectory | None = None
        self.poller = ProgressPoller(self.split_requests)
        self.serving_models: Callable[[], Any] = lambda: None
        self.weights_changed_by: str | None = None
        self.lookups = asyncio.Semaphore(LOOKUPS)
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
        self.planner.num_peers = lambda: len(peers.usable)

    def forget_servers(self, engine: Any, servers: list[str]) -> None:
        """Let the engine's workers close their connections to peers that are gone, as soon as it answers."""
        logger.info("connections to servers that are gone are closed: %s", ", ".join(servers))
        call = asyncio.ensure_future(self.replica_rpc.call(engine, 0, FORGET_SERVERS, servers, always=True))
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

    def set_serving_models(self, models: Any) -> None:
        """Keep vLLM's list of models, from which gRPC requests get LoRA adapters.

        By a weak reference: the list refers to the engine, and so to this state's key.
        """
        self.serving_models = weakref.ref(models)

    def lora_adapters(self) -> dict[str, Any]:
        """The LoRA adapters (vLLM's LoRARequests) by name, those loaded while the server runs included."""
        models = self.serving_models()
        return {} if models is None else dict(models.lora_requests)


_states: WeakKeyDictionary[Any, FrontState] = WeakKeyDictionary()
_making = threading.Lock()  # vLLM processes some inputs in threads


def state_of(input_processor: Any) -> FrontState:
    """The state of the engine that an input processor belongs to, made at the first call."""
    state = _states.get(input_processor)
    if state is not None:
        return state
    with _making:
        if input_processor not in _states:
            tokenizer = getattr(input_processor, "tokenizer", None)
            _states[input_processor] = FrontState(input_processor.vllm_config, tokenizer)
        return _states[input_processor]


def abort_split(engine: Any, request_ids: list[str]) -> None:
    """End the requests of these ids whose prompts are split and which the engine does not have yet."""
    state = front_state(engine)
    for request_id in request_ids:
        state.split_requests.abort(request_id)
        state.leases.abort(request_id)


def front_state(engine: Any) -> FrontState:
    """The state of an AsyncLLM."""
    return state_of(engine.input_processor)
