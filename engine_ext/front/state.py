"""What Starling keeps of one engine in a front's process."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from engine_ext.front.kv_reservations import KVReservations
from engine_ext.front.progress import ProgressPoller
from engine_ext.front.replica_rpc import ReplicaRPC
from engine_ext.requests import RequestPlanner
from replicas.options import ReplicaOptions


class FrontState:
    """One for each engine.

    Attributes:
        planner: plans the engine's requests.
        split_requests: ids of the requests whose prompts are split over replicas now. Between its parts and the whole
            request, the engine does not know such a request.
        internal_ids: the engine's ids of the requests that Starling made for parts of prompts.
        releases: calls under way that release what ended requests held on replicas.
        serving_models: returns vLLM's list of the server's models; None where no OpenAI server uses the engine.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.planner = RequestPlanner(vllm_config, tokenizer)
        config = self.planner.config
        self.replica_rpc = ReplicaRPC((config.replicas if config else ReplicaOptions()).timeout)
        self.reservations = KVReservations()
        self.split_requests: set[str] = set()
        self.internal_ids: set[str] = set()
        self.releases: set[asyncio.Future] = set()
        self.poller = ProgressPoller(self.split_requests)
        self.serving_models: Callable[[], Any] = lambda: None

    def set_serving_models(self, models: Any) -> None:
        """Keep vLLM's list of models, which refers to the engine, and so to this state's key: by a weak reference."""
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


def front_state(engine: Any) -> FrontState:
    """The state of an AsyncLLM."""
    return state_of(engine.input_processor)
