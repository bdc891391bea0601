"""What a front keeps of each engine."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

from starling.config.scheduling import ReplicaOptions
from starling.engine_ext.front.front_state import FrontState, front_state, state_of
from tests.unit.engine_ext.configs import fake_config


class Processor:
    """An input processor as far as FrontState looks at one."""

    def __init__(self, starling: dict | None) -> None:
        self.vllm_config = fake_config()
        self.vllm_config.additional_config = {} if starling is None else {"starling": starling}
        self.tokenizer = object()


def test_each_engine_has_one_state_which_ends_with_it():
    one, other = Processor({}), Processor({})
    assert state_of(one) is front_state(SimpleNamespace(input_processor=one)) is not state_of(other)
    assert state_of(one).planner.tokenizer is one.tokenizer
    assert not hasattr(one, "starling")
    ended = weakref.ref(state_of(one))
    del one
    gc.collect()
    assert ended() is None


def test_the_timeout_is_that_of_the_replicas_section():
    for starling, timeout in (({"replicas": {"timeout": 5}}, 5), ({}, ReplicaOptions().timeout)):
        assert front_state(SimpleNamespace(input_processor=Processor(starling))).rpc.timeout == timeout


def test_the_poller_knows_the_prompts_that_are_split_now():
    engine = SimpleNamespace(input_processor=Processor({}))
    front_state(engine).replicas.state.split_requests.add(SimpleNamespace(request_id="a"))
    assert front_state(engine).poller.waiting() == {"a"}


class Models:
    """As far as the state reads vLLM's OpenAIServingModels."""


def test_adapters_are_those_that_the_server_has_now():
    state = FrontState(Processor({}).vllm_config)
    assert state.lora_adapters() == {}
    models = Models()
    models.lora_requests = {"a": 1}
    state.set_serving_models(models)
    assert state.lora_adapters() == {"a": 1}
    models.lora_requests["b"] = 2
    assert state.lora_adapters() == {"a": 1, "b": 2}
    del models
    assert state.lora_adapters() == {}, "the state does not keep the models, nor the engine that they refer to"
