"""The hooks around chats, on vLLM's own classes."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from vllm.renderers import TokenizeParams
from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer

from starling.vllm_compat import front

OWN, DEFAULT = TokenizeParams(max_total_tokens=9), TokenizeParams(max_total_tokens=7)


def test_the_names_that_are_hooked_are_there():
    """A new vLLM that moves one of these fails here first."""
    rendering = inspect.signature(BaseRenderer.render_chat_async).parameters
    assert list(rendering)[:4] == ["self", "conversations", "chat_params", "tok_params"]
    assert HfRenderer.render_chat_async is BaseRenderer.render_chat_async


def test_the_hooks_are_still_needed():
    """Fails when vLLM hands the request, or the borders of its messages, on: then a hook can go."""
    names = inspect.signature(BaseRenderer.render_chat_async).parameters.keys()
    assert names == {"self", "conversations", "chat_params", "tok_params", "prompt_extras", "skip_mm_cache"}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("given", "used"), [((OWN,), OWN), ((), DEFAULT)], ids=["own", "default"])
def test_engine_inputs_are_added_to_where_that_is_wanted(monkeypatch, wanted, given, used):
    calls = []

    async def render_chat_async(self, conversations, chat_params, tok_params=None, **kwargs):
        calls.append((tok_params, kwargs))
        offsets = {"prompt_token_offsets": [(0, 1)]} if tok_params and tok_params.return_token_offsets else {}
        return conversations, [{"number": number} | offsets for number in range(len(conversations))]

    async def add(renderer, messages, chat_params, engine_input):
        engine_input["added"] = (messages, chat_params, engine_input["prompt_token_offsets"])

    monkeypatch.setattr(BaseRenderer, "render_chat_async", render_chat_async)
    for _ in range(2):
        front.on_rendered_chat(lambda renderer: wanted, add)
    renderer = SimpleNamespace(default_chat_tok_params=DEFAULT)
    made = asyncio.run(BaseRenderer.render_chat_async(renderer, [["a"], ["b"]], "params", *given, prompt_extras={}))
    expected = [{"number": 0}, {"number": 1}]
    if wanted:
        expected = [one | {"added": ([name], "params", [(0, 1)])} for one, name in zip(expected, "ab", strict=True)]
    assert made == ([["a"], ["b"]], expected)
    ((tok_params, kwargs),) = calls
    assert kwargs == {"prompt_extras": {}}
    if wanted:
        assert tok_params.return_token_offsets and tok_params.max_total_tokens == used.max_total_tokens
    else:
        assert tok_params is (given[0] if given else None)


def test_offsets_that_the_request_asks_for_stay(monkeypatch):
    async def render_chat_async(self, conversations, chat_params, tok_params=None):
        return conversations, [{"prompt_token_offsets": [(0, 1)]}]

    async def add(*args):
        pass

    monkeypatch.setattr(BaseRenderer, "render_chat_async", render_chat_async)
    front.on_rendered_chat(lambda renderer: True, add)
    for asked in (True, False):
        tok_params = TokenizeParams(max_total_tokens=9, return_token_offsets=asked)
        _, (made,) = asyncio.run(BaseRenderer.render_chat_async(SimpleNamespace(), [["a"]], "params", tok_params))
        assert ("prompt_token_offsets" in made) is asked
