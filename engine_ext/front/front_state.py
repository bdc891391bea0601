"""State that Starling keeps of one engine in a front's process."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from starling.attention_backends.star.refusals import options_of
from starling.config.parsing import OptionError
from starling.engine_ext.front.planning import rejection
from starling.engine_ext.front.progress import ProgressPoller
from starling.engine_ext.front.requests import RequestPlanner
from starling.features.front_request import FrontRequest
from starling.features.replicas.front import Replicas
from starling.features.replicas.split.split_state import ReplicaRPC

LOOKUPS = 4
"""Number of prompts that are looked up at once (look_up.py): each takes milliseconds of an engine's process."""


class FrontState:
    """State of one engine in a front's process.

    Attributes:
        planner: plans the engine's requests.
        poller: polls the progress of prompts.
        serving_models: returns vLLM's list of the server's models, or None if no OpenAI server uses the engine.
        replicas: prompts that are split over replicas, or None if Starling runs without.
        rpc: calls to the engine's replicas.
        lookups: semaphore that limits the prompts that are looked up at once.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.planner = RequestPlanner(vllm_config, tokenizer)
        self.replicas: Replicas | None = self.planner.features.get("replicas")
        timeout = options_of(vllm_config).replicas.timeout
        self.rpc = ReplicaRPC(timeout) if self.replicas is None else self.replicas.state.rpc
        self.poller = ProgressPoller(self.waiting)
        self.serving_models: Callable[[], Any] = lambda: None
        self.lookups = asyncio.Semaphore(LOOKUPS)

    def outputs(self, request: FrontRequest) -> AsyncGenerator[Any, None]:
        """Return the outputs of a request, from vLLM's engine or from a feature that runs it in its own way.

        Raises:
            VLLMValidationError: the request can't run.
        """
        try:
            split = None if self.replicas is None else self.replicas.outputs(request, self.planner.engine)
        except OptionError as error:
            raise rejection(error) from None
        return request.outputs() if split is None else split

    def waiting(self) -> set[str]:
        """Return the ids of split requests, which the engine may not know."""
        return set() if self.replicas is None else set(self.replicas.waiting())

    def abort(self, request_ids: Sequence[str]) -> None:
        """End the split requests that the engine does not have."""
        if self.replicas is not None:
            self.replicas.abort(request_ids)

    def set_serving_models(self, models: Any) -> None:
        """Keep vLLM's list of models, from which gRPC requests get LoRA adapters.

        The list is held by a weak reference, because it refers to the engine, and so to this state's key.
        """
        self.serving_models = weakref.ref(models)

    def lora_adapters(self) -> dict[str, Any]:
        """Return the LoRA adapters (vLLM's LoRARequests) by name, including those loaded while the server runs."""
        models = self.serving_models()
        return {} if models is None else dict(models.lora_requests)


_states: WeakKeyDictionary[Any, FrontState] = WeakKeyDictionary()
_making = threading.Lock()  # vLLM processes some inputs in threads


def state_of(input_processor: Any) -> FrontState:
    """Return the state of the engine that an input processor belongs to, and make it at the first call."""
    state = _states.get(input_processor)
    if state is not None:
        return state
    with _making:
        if input_processor not in _states:
            tokenizer = getattr(input_processor, "tokenizer", None)
            _states[input_processor] = FrontState(input_processor.vllm_config, tokenizer)
        return _states[input_processor]


def front_state(engine: Any) -> FrontState:
    """Return the state of an AsyncLLM."""
    return state_of(engine.input_processor)
