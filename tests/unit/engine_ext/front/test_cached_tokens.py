"""A request whose prompt is looked up in place of being run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import GenerationError, VLLMClientError, VLLMValidationError

from starling.engine_ext.front.cached_tokens import LookedUp, prepare_look_up
from starling.engine_ext.front.call import Call, current_call


@pytest.fixture
def call():
    call = Call()
    token = current_call.set(call)
    yield call
    current_call.reset(token)


@pytest.mark.parametrize("looks_up", [True, False])
def test_a_look_up_makes_no_stream(call, looks_up):
    """The end of a stream without outputs is a fault for vLLM, whose stack `/v1/messages` logs."""
    call.only_looks_up = looks_up
    request = SimpleNamespace(stream=True)
    prepare_look_up(request)
    assert request.stream is not looks_up
    prepare_look_up(SimpleNamespace())  # a request that has no stream


def test_a_look_up_is_not_made_in_the_background(call):
    background = SimpleNamespace(background=True, stream=True)
    prepare_look_up(background)
    call.only_looks_up = True
    with pytest.raises(VLLMValidationError, match="in the background is not looked up"):
        prepare_look_up(background)


@pytest.mark.parametrize("quiet", [GenerationError, VLLMClientError])
def test_the_end_of_a_look_up_is_an_error_that_vllm_logs_without_a_stack(quiet):
    """The second one on `/v1/messages`: test_front.py has the hook."""
    assert issubclass(LookedUp, quiet)
