"""Bounds of HTTP bodies, with vLLM's own routes and request models behind them: the engine is all that is left out."""

from __future__ import annotations

import asyncio
import tracemalloc
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.tokenize import api_router as tokenize

from starling.engine_ext.front.bounds import BODY, OTHER_VALUES, REQUEST_ID, TOKEN_VALUES
from starling.engine_ext.serving.http import body
from starling.engine_ext.serving.http.body import FEW_VALUES, INVOCATION_VALUES, BoundBody, validator_of

JSON = {"content-type": "application/json"}
COMPLETIONS, CHATS, TOKENIZE, OTHER = "/v1/completions", "/v1/chat/completions", "/tokenize", "/other"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI()
    for module in (completion, chat, tokenize):
        app.include_router(module.router)

    @app.post(OTHER)
    @app.post("/invocations")
    async def other() -> str:
        return "answered"

    init_exception_handler(app)
    app.add_middleware(BoundBody)
    app.state.engine_client = SimpleNamespace(model_config=SimpleNamespace(max_model_len=8192))
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.enable_server_load_tracking = False
    app.state.openai_serving_completion = Handler("create_completion")
    app.state.openai_serving_chat = Handler("create_chat_completion")
    app.state.openai_serving_tokenization = app.state.serving_tokenization = Handler("create_tokenize")
    return app


class Handler:
    """In place of vLLM's object that has the engine: refuses what has come through all checks."""

    def __init__(self, method: str) -> None:
        setattr(self, method, self.refuse)

    async def refuse(self, *_):
        raise ValueError("came through")


@pytest.fixture(scope="module")
def http(app) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


def message_of(response) -> str:
    assert response.status_code in (400, 413), response.text
    return response.json()["error"]["message"]


def with_values(number: int, **fields) -> dict:
    """A body of so many values that are no token ids: the list's name and it, and its elements, are three."""
    given = {"model": "m", "prompt": "a"} | fields
    return given | {"logit_bias": {str(index): 1 for index in range(number - len(given) - 1)}}


@pytest.mark.parametrize("few", [FEW_VALUES, 10**9], ids=["as it is", "never counted"])
def test_small_bodies_come_through(http, few, monkeypatch):
    monkeypatch.setattr(body, "FEW_VALUES", few)
    assert message_of(http.post(COMPLETIONS, json={"model": "m", "prompt": "a"})) == "came through"
    long = {"model": "m", "messages": [{"role": "user", "content": "a, [b], {c}. " * 10_000}]}
    assert message_of(http.post(CHATS, json=long)) == "came through"
    assert http.post(OTHER, content=b"no JSON").json() == "answered"


@pytest.mark.parametrize("many", [False, True], ids=["few values", "many values"])
@pytest.mark.parametrize(
    "text",
    [rb'"\ud800"', rb'"a\uDC00b"', rb'["b", {"c": "\udc00\ud800"}]', b'"\xed\xa0\x80"'],
    ids=["first half", "second half", "wrong order", "as bytes"],
)
def test_half_of_a_surrogate_pair_is_refused_by_the_name_of_its_field(http, text, many):
    """Python's JSON parser takes it, and vLLM's server answers 500 where it sends the text on."""
    rest = b', "logit_bias": {%s}' % b",".join(b'"%d": 1' % index for index in range(FEW_VALUES)) if many else b""
    for field in ("stop", "model", "user", "unknown"):
        content = b'{"model": "m", "prompt": "a", "%s": %s%s}' % (field.encode(), text, rest)
        refused = http.post(COMPLETIONS, content=content, headers=JSON)
        assert message_of(refused).startswith(f"{field} is refused: its text has half of a surrogate pair")
        assert refused.json()["error"]["param"] == field


def test_a_name_with_half_of_a_surrogate_pair_is_refused(http):
    refused = http.post(COMPLETIONS, content=rb'{"model": "m", "a\ud800": 1}', headers=JSON)
    assert message_of(refused).startswith("a? is refused: its text has half of a surrogate pair")


@pytest.mark.parametrize("many", [False, True], ids=["few values", "many values"])
@pytest.mark.parametrize("text", ['"a"'.encode("utf-16-le"), b'"\xff"'], ids=["UTF-16", "no UTF-8"])
def test_other_encodings_are_refused_in_any_field(http, text, many):
    rest = b', "logit_bias": {%s}' % b",".join(b'"%d": 1' % index for index in range(FEW_VALUES)) if many else b""
    for field in (b"stop", b"model", b"user", b"unknown"):
        content = b'{"model": "m", "prompt": "a", "%s": %s%s}' % (field, text, rest)
        assert message_of(http.post(COMPLETIONS, content=content, headers=JSON)).startswith("The body is no valid JSON")


@pytest.mark.parametrize(
    "text", ["😀", "\\\\ud800", "ü", "\\ud83d\\ude00"], ids=["pair", "no escape", "UTF-8", "escapes"]
)
def test_whole_characters_come_through(http, text):
    content = f'{{"model": "m", "prompt": "{text}", "temperature": 0.5}}'.encode()
    assert message_of(http.post(COMPLETIONS, content=content, headers=JSON)) == "came through"


def test_token_ids_have_a_bound_of_their_own(http):
    limit = TOKEN_VALUES.limit
    for tokens in ([7] * limit, [[7] * (limit // 2)] * 2):
        assert message_of(http.post(COMPLETIONS, json={"model": "m", "prompt": tokens})) == "came through"
    refused = http.post(COMPLETIONS, json={"model": "m", "prompt": [[7] * limit, [7]]})
    assert message_of(refused) == (f"token ids is refused: it has {limit + 1} values, and may have {limit} at most.")


def test_a_longer_context_has_a_larger_bound_of_token_ids(http, app, monkeypatch):
    monkeypatch.setattr(app.state.engine_client.model_config, "max_model_len", TOKEN_VALUES.limit)
    tokens = [7] * (2 * TOKEN_VALUES.limit)
    assert message_of(http.post(COMPLETIONS, json={"model": "m", "prompt": tokens})) == "came through"
    assert "may have" in message_of(http.post(COMPLETIONS, json={"model": "m", "prompt": [*tokens, 7]}))


@pytest.mark.parametrize("change", [-1, 0, 1])
def test_all_other_values_have_one_bound(http, change):
    message = message_of(http.post(COMPLETIONS, json=with_values(OTHER_VALUES.limit + change)))
    assert message == "came through" if change <= 0 else message.startswith("all other fields is refused")


def test_a_list_of_wrong_values_ends_at_the_first(http):
    """Each such value has fifteen errors in vLLM's model of a chat, and each error takes a kilobyte."""
    many = [{}] * (OTHER_VALUES.limit - 10)
    response = http.post(CHATS, json={"model": "m", "messages": many})
    assert message_of(response).startswith("messages.0.") and len(response.content) < 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(("path", "limit"), [(OTHER, OTHER_VALUES.limit), ("/invocations", INVOCATION_VALUES)])
def test_a_path_that_does_not_say_what_it_takes_has_a_bound_too(http, path, limit):
    """The object itself is no value."""
    assert validator_of(None) is None
    assert validator_of(FastAPI()) is None, "one that is mounted"
    few = {str(index): 1 for index in range(limit)}
    assert http.post(path, json=few).json() == "answered"
    assert "refused" in message_of(http.post(path, json=few | {"one": 1}))


@pytest.mark.parametrize(
    "content",
    [
        b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"x": [' + b"NaN," * 2000 + b"0]}",
        '{"x": ["\ud800"]}'.encode("utf-16", "surrogatepass") * 2000,
        b"[" * 5000,
    ],
    ids=["deep", "NaN", "UTF-16", "open"],
)
def test_what_is_no_json_is_refused_before_python_parses_it(http, content):
    headers = {"content-type": "application/json"}
    assert "no valid JSON" in message_of(http.post(COMPLETIONS, content=content, headers=headers))


def test_a_body_has_a_bound_and_is_not_read_beyond_it(app, monkeypatch):
    monkeypatch.setattr(body, "BODY", body.Bound(BODY.field, 100, BODY.unit))
    read, sent = [], []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert len(read) == 2 and sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]


def test_files_are_not_read_here(app):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": OTHER, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 200


def test_the_id_in_a_header_has_a_bound(http):
    name = "x" * REQUEST_ID.limit
    assert http.post(OTHER, headers={"x-request-id": name}).status_code == 200
    assert "request_id is refused" in message_of(http.post(OTHER, headers={"x-request-id": name + "x"}))


WORST = {
    "empty lists": b'{"model": "m", "prompt": [%s]}' % b",".join([b"[]"] * 2_800_000),
    "token ids": b'{"model": "m", "prompt": [%s]}' % b",".join([b"7"] * TOKEN_VALUES.limit),
    "wrong messages": b'{"model": "m", "messages": [%s]}' % b",".join([b"{}"] * 16_000),
    "parts": b'{"model": "m", "messages": [{"role": "user", "content": [%s]}]}'
    % b",".join([b'{"type": "text"}'] * 8_000),
    "logit_bias": b'{"model": "m", "prompt": "a", "logit_bias": {%s}}'
    % b",".join(b'"%d": "x"' % i for i in range(600_000)),
    "unknown": b'{"model": "m", "prompt": "a", %s}' % b",".join(b'"a%d": 1' % i for i in range(100_000)),
    "vllm_xargs": b'{"model": "m", "prompt": "a", "vllm_xargs": {%s}}'
    % b",".join(b'"%d": null' % i for i in range(100_000)),
    "stop": b'{"model": "m", "prompt": "a", "stop": [%s]}' % b",".join([b'"a"'] * 2_000_000),
    "text": b'{"model": "m", "prompt": "%s"}' % (b"a, " * 300_000),
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_bodies_take_little_memory(http, name):
    """Counted in bytes that Python allocates at the most at a time, over the bytes of the body."""
    path = CHATS if b'"messages"' in WORST[name] else COMPLETIONS
    headers = {"content-type": "application/json"}
    http.post(path, content=b'{"model": "m"}', headers=headers)
    tracemalloc.start()
    try:
        http.post(path, content=WORST[name], headers=headers)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(WORST[name]) + 8 * 2**20
    finally:
        tracemalloc.stop()
