"""A router in front of several servers that knows what each has cached: `python examples/document_router.py URL URL`.

Each prompt goes to the server that has the fewest tokens to compute before the prompt's first token: those of the
prompt that it has not cached, which `POST /starling/cached` says, and those of prompts that it has got and not begun to
answer. So documents are found in any order. A server that can't be asked, or refuses a request for want of room, is
left out of that request.

The servers run with --enable-prompt-tokens-details. The router passes on paths, headers and bodies as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
ASK_SECONDS = 2.0
OF_CONNECTION = ("connection", "content-length", "host", "keep-alive", "transfer-encoding")
"""Headers that are about one connection, and are not passed on."""


@dataclass
class Server:
    """A server behind the router.

    Attributes:
        waiting: tokens to compute for prompts that it has got and not begun to answer.
    """

    url: str
    waiting: int = 0


def passed_on(headers: httpx.Headers) -> dict[str, str]:
    """The headers of a request or response without those of its connection."""
    return {name: value for name, value in headers.items() if name.lower() not in OF_CONNECTION}


class Router:
    """Forwards requests to servers.

    Args:
        urls: the servers' base URLs.
    """

    def __init__(self, urls: list[str]) -> None:
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))

    async def to_compute(self, server: Server, request: Request, body: bytes) -> int | None:
        """The tokens of a prompt that a server has not cached; None: it does not say."""
        url, headers = f"{server.url}/starling/cached{request.url.path}", passed_on(httpx.Headers(request.headers.raw))
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            answer = await self.client.post(url, content=body, headers=headers, timeout=ASK_SECONDS)
            found = answer.raise_for_status().json()
            return found["plan"]["prompt_tokens"] - max(each["cached_tokens"] for each in found["replicas"])
        return None

    async def forward(self, request: Request) -> Response:
        """Send a request to the best server that takes it."""
        body = await request.body()
        answers = await asyncio.gather(*(self.to_compute(server, request, body) for server in self.servers))
        known = [tokens for tokens in answers if tokens is not None]
        tokens_of = [(max(known, default=0) if tokens is None else tokens) for tokens in answers]
        order = sorted(
            zip(answers, tokens_of, self.servers, strict=True),
            key=lambda each: (each[0] is None, each[1] + each[2].waiting),
        )
        refused: httpx.Response | None = None
        for _, tokens, server in order:
            server.waiting += tokens
            try:
                sent = self.client.build_request(
                    request.method,
                    f"{server.url}{request.url.path}",
                    params=request.url.query,
                    content=body,
                    headers=passed_on(httpx.Headers(request.headers.raw)),
                )
                response = await self.client.send(sent, stream=True)
            except httpx.TransportError:
                server.waiting -= tokens
                continue
            if response.status_code in (429, 503):
                server.waiting -= tokens
                await response.aread()
                refused = response
                continue
            return self.answer(response, server, tokens)
        if refused is not None:
            return Response(refused.content, refused.status_code, passed_on(refused.headers))
        return JSONResponse({"error": "no server answers"}, 503)

    def answer(self, response: httpx.Response, server: Server, tokens: int) -> Response:
        """A server's response as it comes in; with its first bytes the prompt has begun to be answered."""

        async def content() -> AsyncGenerator[bytes, None]:
            left = tokens
            try:
                async for piece in response.aiter_raw():
                    server.waiting -= left
                    left = 0
                    yield piece
            finally:
                server.waiting -= left
                await response.aclose()

        return StreamingResponse(content(), response.status_code, passed_on(response.headers))


async def health(request: Request) -> Response:
    return Response()


def application(urls: list[str]) -> Starlette:
    """The router as an ASGI application."""
    router = Router(urls)
    routes = [Route(path, router.forward, methods=["POST"]) for path in PATHS]
    return Starlette(routes=[*routes, Route("/health", health)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", metavar="URL", help="a server, such as http://10.0.0.1:8000")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (%(default)s)")
    args = parser.parse_args()
    uvicorn.run(application(args.urls), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
