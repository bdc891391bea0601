"""Requests that the server must refuse, with the status of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpc import StatusCode

Body = dict[str, Any]
PROMPT = [5] * 300
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class BadHttp:
    """A request of HTTP, with its expected status.

    Attributes:
        change: makes a bad body of a good one and of the server's limit of requests.
    """

    name: str
    change: Callable[[Body, int], Body]
    status: str = "HTTP 400"
    path: str = COMPLETIONS
    headers: dict[str, str] | None = None


@dataclass(frozen=True)
class BadGrpc:
    """A call of gRPC, with its expected code.

    Attributes:
        fields: fields of the call, by the server's limit of requests.
    """

    name: str
    fields: Callable[[int], dict[str, Any]]
    prompt: Sequence[int] = tuple(PROMPT)
    code: StatusCode = StatusCode.INVALID_ARGUMENT


def star(**options: Any) -> Callable[[Body, int], Body]:
    return lambda body, queue: body | {"vllm_xargs": body["vllm_xargs"] | options}


def body(**fields: Any) -> Callable[[Body, int], Body]:
    return lambda body, queue: body | fields


def fields(**values: Any) -> Callable[[int], dict[str, Any]]:
    return lambda queue: values


HTTP_REFUSALS = [
    BadHttp("block size", star(star_block_size=7)),
    BadHttp("anchor size", star(star_anchor_size=8192)),
    BadHttp("overlap size", star(star_overlap_size=8192)),
    BadHttp("mode", star(star="perhaps")),
    BadHttp("option", star(star_blocks=4)),
    BadHttp("a size of documents that moves", star(star_block_size="n/4", star_segments=[30])),
    BadHttp("replicas", star(star_replicas=99)),
    BadHttp("a text of several tokens", star(star_segments="several words")),
    BadHttp("offsets", star(star_segments=[70, 30])),
    BadHttp("offset behind the prompt", star(star_segments=[30, 9000])),
    BadHttp("messages of no chat", star(star_segments="auto")),
    BadHttp("top_p", body(top_p=7)),
    BadHttp("regex", body(structured_outputs={"regex": "("})),
    BadHttp("long prompt", body(prompt=[5] * 20_000)),
    BadHttp("messages", body(messages="none"), path="/v1/chat/completions"),
    BadHttp("model", body(model="none"), "HTTP 404"),
    BadHttp("path", body(), "HTTP 404", "/v1/none"),
    BadHttp("key", body(), "HTTP 401", headers={"authorization": "Bearer wrong"}),
    BadHttp("choices", lambda body, queue: body | {"n": queue + 1, "temperature": 1}, "HTTP 503"),
]
GRPC_REFUSALS = [
    BadGrpc("block size", fields(star={"mode": "on", "block_size": 7})),
    BadGrpc("anchor size", fields(star={"mode": "on", "block_size": 64, "anchor_size": 128})),
    BadGrpc("offsets", fields(star={"mode": "on", "segments": [70, 30]})),
    BadGrpc("messages of no chat", fields(star={"mode": "on", "segments": "auto"})),
    BadGrpc("replicas", fields(star={"mode": "on", "block_size": 64, "replicas": 99})),
    BadGrpc("top_p", fields(top_p=7.0)),
    BadGrpc("regex", fields(structured_outputs={"regex": "("})),
    BadGrpc("adapter", fields(lora_name="none")),
    BadGrpc("long prompt", fields(), [5] * 20_000),
    BadGrpc("token", fields(), [10**6]),
    BadGrpc("no prompt", fields(), []),
    BadGrpc("choices", lambda queue: {"n": queue + 1, "temperature": 1.0}, code=StatusCode.RESOURCE_EXHAUSTED),
]
