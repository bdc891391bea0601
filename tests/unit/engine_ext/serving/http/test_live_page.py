"""The live page's routes: keys, headers, limits, and viewers that do not read."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from vllm.v1.engine.exceptions import EngineDeadError

from starling.config.entry import ADMIN_KEY_ENV
from starling.engine_ext.serving.http import live_page
from starling.engine_ext.serving.http.live_page import MAX_RESPONSES, PAGE, LivePage

BODY = b'{"requests":[]}'
PAGE_PATH, DATA_PATH = "/starling/live", "/starling/live.json"


class View:
    """In place of LiveView."""

    def __init__(self) -> None:
        self.looks = 0
        self.answers = asyncio.Event()
        self.answers.set()
        self.content: bytes | Exception = BODY

    async def body(self) -> bytes:
        self.looks += 1
        await self.answers.wait()
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


def make_app(view: View, *api_keys: str, root_path: str = ""):
    """The middleware around an application that answers 404, with FastAPI's scope around it."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"vLLM"})

    page = LivePage(app)
    page.view = view
    state = SimpleNamespace(args=SimpleNamespace(api_key=list(api_keys)), engine_client=None)

    async def with_state(scope, receive, send):
        await page(scope | {"app": SimpleNamespace(state=state), "root_path": root_path}, receive, send)

    return with_state


def client(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


@pytest.fixture(autouse=True)
def no_admin_key(monkeypatch):
    monkeypatch.delenv(ADMIN_KEY_ENV, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_the_routes_and_all_others():
    async def scenario():
        async with client(make_app(View())) as http:
            page, data = await http.get(PAGE_PATH), await http.get(DATA_PATH)
            assert (page.status_code, page.content) == (200, PAGE)
            assert (data.status_code, data.content) == (200, BODY)
            assert data.headers["content-type"] == "application/json"
            for response in (page, data):
                assert response.headers["cache-control"] == "no-store"
                assert response.headers["x-content-type-options"] == "nosniff"
                assert "access-control-allow-origin" not in response.headers
            head = await http.head(PAGE_PATH)
            assert (head.status_code, head.headers["content-length"]) == (200, str(len(PAGE)))
            assert (await http.post(DATA_PATH)).status_code == 405
            for path in ("/", "/starling", "/starling/live/", "/starling/live.json/x", "/v1/starling/live"):
                assert (await http.get(path)).text == "vLLM"
        async with client(make_app(View(), root_path="/proxy")) as http:
            assert (await http.get("/proxy" + DATA_PATH)).content == BODY

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("api_keys", "admin_key", "given", "is_valid"),
    [
        ([], None, None, True),
        (["one", "other"], None, "Bearer other", True),
        (["one"], None, "bearer one", True),
        (["one"], None, None, False),
        (["one"], None, "Bearer ", False),
        (["one"], None, "Bearer öne", False),
        (["one"], None, "Basic one", False),
        (["one"], "admin", "Bearer one", False),
        (["one"], "admin", "Bearer admin", True),
        ([], "admin", None, False),
    ],
)
def test_the_data_needs_a_key_and_the_page_none(monkeypatch, api_keys, admin_key, given, is_valid):
    if admin_key:
        monkeypatch.setenv(ADMIN_KEY_ENV, admin_key)
    headers = {} if given is None else {"authorization": given.encode("latin-1")}

    async def scenario():
        view = View()
        async with client(make_app(view, *api_keys)) as http:
            assert (await http.get(PAGE_PATH)).status_code == 200
            response = await http.get(DATA_PATH, headers=headers)
            assert response.status_code == (200 if is_valid else 401)
            assert view.looks == is_valid
            if not is_valid:
                assert response.headers["www-authenticate"] == "Bearer"

    asyncio.run(scenario())


def test_the_key_of_the_environment_is_needed_too(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "one")

    async def scenario():
        async with client(make_app(View())) as http:
            assert (await http.get(DATA_PATH)).status_code == 401
            assert (await http.get(DATA_PATH, headers={"authorization": "Bearer one"})).status_code == 200

    asyncio.run(scenario())


def test_a_dead_engine_gives_503():
    async def scenario():
        view = View()
        view.content = EngineDeadError()
        async with client(make_app(view)) as http:
            response = await http.get(DATA_PATH)
            assert (response.status_code, response.json()) == (503, {"error": str(EngineDeadError())})

    asyncio.run(scenario())


def test_so_many_viewers_wait_at_the_same_time_and_no_more():
    async def scenario():
        view = View()
        view.answers.clear()
        async with client(make_app(view)) as http:
            waiting = [asyncio.create_task(http.get(DATA_PATH)) for _ in range(MAX_RESPONSES)]
            while view.looks < MAX_RESPONSES:
                await asyncio.sleep(0)
            refused = await http.get(DATA_PATH)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            waiting.pop().cancel()
            await asyncio.sleep(0)
            view.answers.set()
            assert (await http.get(DATA_PATH)).status_code == 200, "a viewer that has left holds no place"
            assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}

    asyncio.run(scenario())


def test_a_viewer_that_does_not_read_holds_no_answer():
    """Over a real connection, whose buffers are full."""

    async def scenario():
        view = View()
        view.content = b"x" * 20_000_000
        page = make_app(view)
        ended = asyncio.Event()

        async def app(scope, receive, send):
            await page(scope, receive, send)
            ended.set()

        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        with socket.create_connection(server.servers[0].sockets[0].getsockname()) as connection:
            connection.sendall(f"GET {DATA_PATH} HTTP/1.1\r\nhost: server\r\n\r\n".encode())
            await asyncio.wait_for(ended.wait(), 300)
        server.should_exit = True
        await serving

    asyncio.run(scenario())


def test_the_policy_allows_the_pages_own_script_and_style_only():
    policy = live_page.PAGE_HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_data():
    text = PAGE.decode()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<(?:script|link|img|iframe)[^>]*\bsrc=", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\son[a-z]+=|style=", text)
