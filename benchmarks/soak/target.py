"""The server under load, and the clients of it: HTTP, gRPC and AdminService."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc

from benchmarks.soak.cases import Case
from benchmarks.streaming_clients import events
from starling.client import AsyncClient, Delta, Final
from starling.client.channel import SERVICE
from starling.client.requests import Prompt
from starling.v1 import admin_pb2 as admin
from starling.v1 import admin_pb2_grpc

STARLING, HTTP, PLAIN = "starling", "http", "plain"
Metadata = Sequence[tuple[str, str]]
FORMS = {"regex": "regex", "choices": "choice", "json_schema": "json"}  # gRPC's names and HTTP's


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        http, grpc: host:port.
        pid: id of its first process.
        queue: its --max-num-queued-reqs.
        front: STARLING, or one of the servers that get requests over HTTP only: HTTP, which is the same server, and
            PLAIN, which is vLLM without Starling. PLAIN has no AdminService.
        hostile_key: a valid API key, of clients that do what they can against the others.
    """

    http: str
    grpc: str
    model: str
    pid: int
    api_key: str
    admin_key: str
    queue: int
    replicas: int = 1
    front: str = STARLING
    hostile_key: str = ""


class RefusedError(Exception):
    """The HTTP server answered with a status of 400 or more, or with an error in a stream."""


@dataclass
class Output:
    """The output tokens of each choice, and why each ended; over the chat API its text in place of the tokens."""

    tokens: dict[int, list[Any]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)

    def add(self, index: int, tokens: list[Any], finish: str | None) -> None:
        self.tokens.setdefault(index, []).extend(tokens)
        if finish:
            self.finished[index] = finish


class Clients:
    """One connection of gRPC and a pool of HTTP connections, to the server or to a relay in front of it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.credentials = {"authorization": f"Bearer {target.api_key}"}

    async def __aenter__(self) -> Clients:
        # The server closes a connection that was idle for 5 s. A request that is sent at that moment would be lost.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self.session = aiohttp.ClientSession(connector=connector, headers=self.credentials)
        self.keyless = aiohttp.ClientSession(connector=connector, connector_owner=False)
        self.grpc = AsyncClient(self.target.grpc, api_key=self.target.api_key, retries=0)
        self.admin_channel = grpc.aio.insecure_channel(self.target.grpc)
        options = [("grpc.max_send_message_length", -1)]  # which also gives it a connection of its own
        self.raw_channel = grpc.aio.insecure_channel(self.target.grpc, options)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.admin_channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.keyless.close()
        await self.session.close()
        await self.grpc.close()
        await self.admin_channel.close()
        await self.raw_channel.close()

    async def control(self, name: str, message: Any) -> Any:
        """Return the response of a method of AdminService."""
        metadata = (("authorization", f"Bearer {self.target.admin_key}"),)
        return await getattr(self.admin, name)(message, metadata=metadata)

    def raw(self, method: str, message: bytes, metadata: Metadata | None = None) -> Awaitable[bytes]:
        """Call InferenceService with bytes; without ``metadata`` the call has the key of hostile clients."""
        call = self.raw_channel.unary_unary(f"/{SERVICE}/{method}")
        return call(message, metadata=metadata or (("authorization", f"Bearer {self.target.hostile_key}"),))

    def raw_upload(self, parts: AsyncIterator[bytes], metadata: Metadata) -> grpc.aio.StreamStreamCall:
        """Start an upload of bytes."""
        return self.raw_channel.stream_stream(f"/{SERVICE}/GenerateUploadStream")(parts, metadata=metadata)

    async def cache(self) -> list[admin.EngineCache]:
        """Return the KV cache of each engine, with its requests. Of PLAIN, the numbers of requests of all engines."""
        if self.target.front == PLAIN:
            text = await self.metrics()
            running, waiting = (int(series_sum(text, f"vllm:num_requests_{state}")) for state in ("running", "waiting"))
            return [admin.EngineCache(requests_running=running, requests_waiting=waiting)]
        response = await self.control("GetCacheState", admin.GetCacheStateRequest(per_request=True))
        return list(response.engines)

    @contextlib.asynccontextmanager
    async def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield a response of the HTTP server.

        Raises:
            RefusedError: its status is 400 or more.
        """
        async with self.session.post(f"http://{self.target.http}{path}", json=body, headers=headers) as response:
            if response.status >= 400:
                raise RefusedError(f"HTTP {response.status}", await response.text())
            yield response

    async def metrics(self) -> str:
        """Return the text of /metrics."""
        async with self.session.get(f"http://{self.target.http}/metrics") as response:
            return await response.text()

    async def live(self, path: str) -> bytes:
        """Read a path of the page of requests, with the admin key (raises RefusedError: its status is 400 or more)."""
        headers = {"authorization": f"Bearer {self.target.admin_key}"}
        async with self.keyless.get(f"http://{self.target.http}{path}", headers=headers) as response:
            if response.status >= 400:
                raise RefusedError(f"HTTP {response.status}", await response.text())
            return await response.read()

    async def complete(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> Output:
        """Return a completion over HTTP, streamed if the body says so."""
        output = Output()
        async with self.post("/v1/completions", body, headers) as response:
            async for data in events(response.content) if body.get("stream") else one(await response.json()):
                if "error" in data:
                    raise RefusedError(f"HTTP {data['error'].get('code')} in a stream", json.dumps(data))
                for choice in data["choices"]:
                    output.add(choice["index"], choice["token_ids"] or [], choice["finish_reason"])
        return output

    async def chat(self, body: dict[str, Any]) -> Output:
        """Return a chat completion over HTTP, not streamed."""
        output = Output()
        async with self.post("/v1/chat/completions", body | {"stream": False}) as response:
            for choice in (await response.json())["choices"]:
                output.add(choice["index"], [choice["message"]["content"] or ""], choice["finish_reason"])
        return output

    async def stream(self, prompt: Prompt, *, upload: bool = False, **fields: Any) -> Output:
        """Return the output of a stream over gRPC."""
        output = Output()
        async with contextlib.aclosing(self.grpc.stream(prompt, upload=upload, **fields)) as received:
            async for event in received:
                if isinstance(event, Delta):
                    output.add(event.index, event.token_ids, None)
                elif isinstance(event, Final):
                    output.add(event.index, [], event.finish_reason)
        return output

    async def generate(self, prompt: Prompt, **fields: Any) -> Output:
        """Return one response over gRPC."""
        output = Output()
        for choice in (await self.grpc.generate(prompt, **fields)).choices:
            output.add(choice.index, choice.token_ids, choice.finish_reason)
        return output


async def one(value: Any) -> AsyncIterator[Any]:
    yield value


def body_of(case: Case, model: str) -> dict[str, Any]:
    """Return a case as the body of a completion."""
    body = {"model": model, "prompt": list(case.prompt), "max_tokens": case.max_tokens, "temperature": 0}
    body |= {"return_token_ids": True, "vllm_xargs": case.star}
    if case.form:
        return body | {"structured_outputs": {FORMS[name]: value for name, value in case.form.items()}}
    return body | {"ignore_eos": True}


def fields_of(case: Case) -> dict[str, Any]:
    """Return a case as the fields of a call of gRPC."""
    fields = {"max_tokens": case.max_tokens, "temperature": 0, "star": case.star}
    return fields | ({"structured_outputs": case.form} if case.form else {"ignore_eos": True})


def series_values(text: str, name: str) -> list[float]:
    """Return the values of the series of a metric in the text of /metrics."""
    return list(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))


def series_sum(text: str, name: str) -> float:
    """Sum of the series of a metric in the text of /metrics."""
    return sum(series_values(text, name))


IDLE_SECONDS = 150
"""Longer than a replica that hangs is waited for."""


async def wait_idle(clients: Clients, seconds: float = IDLE_SECONDS) -> list[admin.EngineCache]:
    """Return the state of the engines once none has a request or a page in use, or after ``seconds``."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        states = await clients.cache()
        busy = any(state.requests_running or state.requests_waiting or state.pages_used for state in states)
        if not busy or asyncio.get_running_loop().time() > deadline:
            return states
        await asyncio.sleep(0.1)
