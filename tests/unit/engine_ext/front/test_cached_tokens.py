"""A request whose prompt is looked up in place of being run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

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


def test_a_look_up_is_not_made_in_the_background(call):
    background = SimpleNamespace(background=True, stream=True)
    prepare_look_up(background)
    call.only_looks_up = True
    with pytest.raises(VLLMValidationError, match="in the background is not looked up"):
        prepare_look_up(background)
