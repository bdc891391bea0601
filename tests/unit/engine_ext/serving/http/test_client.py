"""What is noted of a server and of each request to it, by an application that vLLM's middleware option extends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from starling.engine_ext.front.call import current_call
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.serving.http import middleware
from starling.engine_ext.serving.http.middleware import NoteClient
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine


class Models:
    """As far as Starling reads vLLM's OpenAIServingModels."""

    def __init__(self, **adapters: int) -> None:
        self.lora_requests = adapters


@pytest.fixture
def application(monkeypatch) -> FastAPI:
    """An application with the state that vLLM gives it before it starts."""
    monkeypatch.setattr(middleware, "is_hooked", lambda: True)
    app = FastAPI()
    app.add_middleware(NoteClient)
    app.state.engine_client, app.state.openai_serving_models = FakeEngine(), Models(sql=1)
    app.state.args = SimpleNamespace(enable_prompt_tokens_details=False)
    return app


def start_and_stop(application: FastAPI) -> list[str]:
    """The types of the messages that an application answers with."""
    received = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]
    sent = []

    async def receive():
        return received.pop()

    async def send(message):
        sent.append(message["type"])

    asyncio.run(application({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
    return sent


STARTED = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_the_list_of_models_is_noted_when_the_application_starts(application):
    assert start_and_stop(application) == STARTED
    state = front_state(application.state.engine_client)
    assert state.lora_adapters() == {"sql": 1}
    application.state.openai_serving_models.lora_requests["chat"] = 2
    assert state.lora_adapters() == {"sql": 1, "chat": 2}, "those loaded later too"


def test_a_process_without_hooks_does_not_start(application, monkeypatch):
    """As one of several API servers whose plugin has failed."""
    monkeypatch.setattr(middleware, "is_hooked", lambda: False)
    assert start_and_stop(application) == ["lifespan.startup.failed"]


def test_a_server_that_only_renders_prompts_starts(application):
    application.state.engine_client = None  # as vLLM's init_render_app_state leaves it
    assert start_and_stop(application) == STARTED


def test_a_request_has_a_call_with_its_key(application):
    calls = []

    @application.get("/")
    async def answer():
        calls.append(current_call.get())

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        pass

    headers = [(b"authorization", b"Bearer one")]
    request = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
    asyncio.run(application(request, receive, send))
    (call,) = calls
    assert (call.api_key, call.sees_cached) == ("one", False)
