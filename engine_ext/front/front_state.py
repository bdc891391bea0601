"""What Starling keeps of one engine in a front's process."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from starling.config.parsing import OptionError
from starling.engine_ext.front.planning import rejection
from starling.engine_ext.front.progress import ProgressPoller
from starling.engine_ext.front.requests import RequestPlanner
from starling.features.front_part import FrontRequest
from starling.features.replicas.front import Replicas
from starling.features.replicas.split.split_state import SplitState

LOOKUPS = 4
"""Prompts that are looked up at once (look_up.py): each takes milliseconds of an engine's process."""


class FrontState:
    """One for each engine.

    Attributes:
        planner: plans the engine's requests.
        poller: watches how far prompts are.
        serving_models: returns vLLM's list of the server's models; None where no OpenAI server uses the engine.
        lookups: the turns of prompts that are looked up.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.planner = RequestPlanner(vllm_config, tokenizer)
        self.poller = ProgressPoller(self.waiting)
        self.serving_models: Callable[[], Any] = lambda: None
        self.lookups = asyncio.Semaphore(LOOKUPS)

    def outputs(self, request: FrontRequest) -> AsyncGenerator[Any, None]:
        """The outputs of a request, from vLLM's engine or from a feature that runs it in its own way.

        Raises:
            VLLMValidationError: the request can't run.
        """
        if not self.planner.parts:
            return request.outputs()
        facts = self.planner.engine
        try:
            found = (part.outputs(request, facts) for part in self.planner.parts)
            return next((outputs for outputs in found if outputs is not None), None) or request.outputs()
        except OptionError as error:
            raise rejection(error) from None

    def waiting(self) -> set[str]:
        """The ids of requests that features run, and which the engine may not know."""
        return {request_id for part in self.planner.parts for request_id in part.waiting()}

    def abort(self, request_ids: Sequence[str]) -> None:
        """End the requests that features run and which the engine does not have."""
        for part in self.planner.parts:
            part.abort(request_ids)

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


def front_state(engine: Any) -> FrontState:
    """The state of an AsyncLLM."""
    return state_of(engine.input_processor)


def split_state(engine: Any) -> SplitState:
    """What a server's front keeps of the replicas of an AsyncLLM for which Starling is activated."""
    part = front_state(engine).planner.part(Replicas)
    assert part is not None
    return part.state
