"""Which requests need a key, by an application that has the middleware as vLLM adds it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient, WebSocketDenialResponse

from starling.engine_ext.serving.http.api_key import OPEN_PATHS, RequireKey

KEY = {"authorization": "bearer one"}


def client(root_path: str = "", keys: tuple[str, ...] = ("one", "two")) -> TestClient:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequireKey)
    app.state.args = SimpleNamespace(api_key=list(keys))

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    def answer(path: str) -> str:
        return path

    return TestClient(app, root_path=root_path)


@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_every_path_needs_a_key_but_those_of_probes_and_docs(root_path):
    http = client(root_path)
    for path in (*OPEN_PATHS, "/metrics/", "/static/swagger-ui.css"):
        assert http.get(root_path + path).status_code == 200, path
    for path in ("/", "/invocations", "/tokenize", "/v1/models", "/health/", "/healthy", "/metricsx", "/load"):
        refused = http.post(root_path + path)
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"}), path
        assert refused.headers["www-authenticate"] == "Bearer"
        assert http.post(root_path + path, headers={"authorization": "Bearer three"}).status_code == 401
        assert http.post(root_path + path, headers=KEY).status_code == 200, path
        assert http.options(root_path + path).status_code == 200, "a browser asks so before it sends a key"


def test_a_server_without_keys_asks_for_none():
    assert client(keys=("",)).post("/invocations").status_code == 200


def test_a_websocket_needs_a_key():
    with pytest.raises(WebSocketDenialResponse) as refused, client().websocket_connect("/v1/realtime"):
        pass
    assert refused.value.status_code == 401
