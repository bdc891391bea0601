"""A request whose prompt is looked up in place of being run."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.v1.engine.output_processor import OutputProcessor

from starling.engine_ext.front import look_up
from starling.engine_ext.front.call import Call, current_call
from starling.engine_ext.front.look_up import prepare_look_up


@pytest.fixture
def call():
    call = Call()
    token = current_call.set(call)
    yield call
    current_call.reset(token)


@pytest.mark.parametrize("looks_up", [True, False])
def test_a_look_up_makes_no_stream(call, looks_up):
    """Its answer is one object."""
    call.only_looks_up = looks_up
    request = SimpleNamespace(stream=True)
    prepare_look_up(request)
    assert request.stream is not looks_up
    prepare_look_up(SimpleNamespace())  # a request that has no stream


def test_beams_are_not_looked_up(call):
    """Beam search makes prompts of its own, each of which would end the call."""
    beams = SimpleNamespace(use_beam_search=True)
    prepare_look_up(beams)
    call.only_looks_up = True
    with pytest.raises(VLLMValidationError, match="A beam search is not looked up") as error:
        prepare_look_up(beams)
    assert error.value.parameter == "use_beam_search"


def test_a_look_up_is_not_made_in_the_background(call):
    background = SimpleNamespace(background=True, stream=True)
    prepare_look_up(background)
    call.only_looks_up = True
    with pytest.raises(VLLMValidationError, match="in the background is not looked up"):
        prepare_look_up(background)


class Engine:
    """An AsyncLLM that admits two requests, on vLLM's own output processor."""

    vllm_config = None

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=True, stream_interval=1)

    def check_admission(self, n, request_id):
        if self.output_processor.get_num_unfinished_requests() + n > 2:
            raise QueueOverflowError


def test_look_ups_count_as_requests_while_they_wait(monkeypatch):
    answers = asyncio.Event()

    async def answer(engine, rank, name, *question):
        await answers.wait()
        return {"tokens": 3}

    monkeypatch.setattr(look_up, "num_engine_cores", lambda engine: 1)
    monkeypatch.setattr(look_up, "call_engine_core", answer)
    monkeypatch.setattr(look_up, "config_of", lambda config: None)
    state = SimpleNamespace(lookups=asyncio.Semaphore(1))
    monkeypatch.setattr(look_up, "front_state", lambda engine: state)

    async def ask(engine, name):
        return [output async for output in look_up._ask(engine, ([1, 2],), None, Call(), name)]

    async def scenario():
        engine = Engine()
        waiting = [asyncio.create_task(ask(engine, f"r{number}")) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueOverflowError):
            await ask(engine, "beyond")
        answers.set()
        assert [len(outputs) for outputs in await asyncio.gather(*waiting)] == [1, 1]
        assert engine.output_processor.get_num_unfinished_requests() == 0
        assert len(await ask(engine, "later")) == 1

    asyncio.run(scenario())
