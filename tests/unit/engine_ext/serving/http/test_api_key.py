"""Which requests need a key, by an application that has the middleware as vLLM adds it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm
from fastapi import FastAPI
from starlette.testclient import TestClient, WebSocketDenialResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from starling.config.entry import ADMIN_KEY_ENV
from starling.engine_ext.serving.http.middleware import OPEN_PATHS, OPERATOR_PATHS, RequireKey, is_open

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


ADMIN = {"authorization": "Bearer theirs"}


@pytest.mark.parametrize("path", [*OPERATOR_PATHS, "/pause%0A"])
@pytest.mark.parametrize("keys", [("one",), ()], ids=["with API keys", "without"])
@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_who_has_the_admin_key_alone_controls_the_server(monkeypatch, path, keys, root_path):
    monkeypatch.setenv(ADMIN_KEY_ENV, "theirs")
    http = client(root_path, keys)
    statuses = [http.post(root_path + path, headers=headers).status_code for headers in (ADMIN, KEY, {})]
    assert statuses == [200, 401, 401]
    assert http.post("/tokenize", headers=ADMIN).status_code == (401 if keys else 200)


@pytest.mark.parametrize("path", [*OPERATOR_PATHS, "/pause%0A"])
def test_without_an_admin_key_no_client_controls_a_server_with_keys(monkeypatch, path):
    monkeypatch.delenv(ADMIN_KEY_ENV, raising=False)
    refused = client().post(path, headers=KEY)
    assert refused.status_code == 403 and ADMIN_KEY_ENV in refused.json()["error"]
    assert client().post(path).status_code == 401
    assert client(keys=()).post(path).status_code == 200, "a server without keys"


def test_vllm_takes_the_admin_key_where_it_asks_for_an_api_key(monkeypatch):
    monkeypatch.setenv(ADMIN_KEY_ENV, "theirs")
    app = FastAPI()
    app.add_middleware(AuthenticationMiddleware, tokens=["one"])
    app.add_middleware(RequireKey)
    app.state.args = SimpleNamespace(api_key=["one"])
    app.post("/v1/load_lora_adapter")(lambda: "loaded")
    http = TestClient(app)
    assert http.post("/v1/load_lora_adapter", headers=ADMIN).json() == "loaded"
    assert http.post("/v1/load_lora_adapter", headers=KEY).status_code == 401


ROUTE = re.compile(r'@(?:\w*router|app)\.(?:get|post|put|delete|patch|head|api_route|websocket|route)\(\s*"([^"]+)"')
CLIENT_FOLDERS = ("/v1/", "/v2/", "/cohere/v2/", "/inference/v1/generate")
CLIENT_PATHS = {
    *("/classify", "/detokenize", "/generative_scoring", "/invocations", "/kv_event_sources", "/load", "/pooling"),
    *("/rerank", "/score", "/tokenize", "/tokenizer_info"),
}
SUPERVISOR_PATHS = {"/ready", "/readyz"}  # of vLLM's dp_supervisor, which is no API server


def test_each_path_of_vllm_is_open_or_a_clients_or_an_operators():
    """A path that a new vLLM adds has to be put into one of these by hand."""
    sources = (Path(vllm.__file__).parent / "entrypoints").rglob("*.py")
    paths = {path for source in sources for path in ROUTE.findall(source.read_text(encoding="utf-8"))}
    assert {"/pause", "/invocations", "/v1/completions", "/v1/load_lora_adapter"} <= paths
    unknown = paths - set(OPERATOR_PATHS) - CLIENT_PATHS - SUPERVISOR_PATHS
    assert {path for path in unknown if not (is_open(path) or path.startswith(CLIENT_FOLDERS))} == set()
