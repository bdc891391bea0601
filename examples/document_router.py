"""A router in front of several servers that knows what each has cached: `python examples/document_router.py URL URL`.

Each prompt goes to the server that has the fewest tokens to compute before the prompt's first token: those of the
prompt that it has not cached, which `POST /starling/cached` says, and those of prompts that it has got and not begun to
answer. So documents are found in any order. A server that can't be asked, or refuses a request for want of room, is
left out of that request. A client that leaves ends its request.

The servers run with documents (--preset rag), or with --enable-prompt-tokens-details. The router passes on paths,
headers and bodies as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
ASK_SECONDS = 2.0
MAX_BODY = 32 << 20  # bytes
OF_CONNECTION = {
    *(b"connection", b"content-length", b"expect", b"host", b"keep-alive", b"proxy-authorization", b"te", b"trailer"),
    *(b"transfer-encoding", b"upgrade"),
}
"""Headers that are about one connection, and are not passed on; so are those that `connection` names."""

Headers = list[tuple[bytes, bytes]]
log = logging.getLogger("router")


@dataclass
class Server:
    """A server behind the router.

    Attributes:
        waiting: tokens to compute for prompts that it has got and not begun to answer.
    """

    url: str
    waiting: int = 0

    @contextlib.contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        self.waiting += tokens
        try:
            yield
        finally:
            self.waiting -= tokens


def passed_on(headers: Headers) -> Headers:
    """Return the headers of a request or response without those of its connection."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    left_out = OF_CONNECTION.union(name.strip() for name in b",".join(values).lower().split(b","))
    return [(name.lower(), value) for name, value in headers if name.lower() not in left_out]


class Router:
    """Forwards requests to servers.

    Args:
        urls: the servers' base URLs.
    """

    def __init__(self, urls: list[str]) -> None:
        self.servers = [Server(url.rstrip("/")) for url in urls]
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # those of one client are not for the others
        self.client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None), cookies=no_cookies)
        self.warned: set[tuple[str, int]] = set()

    async def to_compute(self, server: Server, path: str, headers: Headers, body: bytes) -> int | None:
        """Return the tokens of a prompt that a server has not cached, or None if it does not say."""
        url = f"{server.url}/starling/cached{path}"
        with contextlib.suppress(httpx.HTTPError, LookupError, TypeError, ValueError):
            answer = await self.client.post(url, content=body, headers=passed_on(headers), timeout=ASK_SECONDS)
            self.warn(server, answer)
            found = answer.raise_for_status().json()
            return found["plan"]["prompt_tokens"] - max(each["cached_tokens"] for each in found["replicas"])
        return None

    def warn(self, server: Server, answer: httpx.Response) -> None:
        """Say once that a server does not tell what it has cached."""
        status = answer.status_code
        if status in (403, 404) and (server.url, status) not in self.warned:
            self.warned.add((server.url, status))
            log.warning("%s does not say what it has cached: %d %s", server.url, status, answer.text[:300])

    async def ranked(
        self, servers: Iterable[Server], path: str, headers: Headers, body: bytes
    ) -> list[tuple[int, Server]]:
        """Return the servers, the best for a prompt first, and how many tokens each has to compute.

        Those that do not say come last. They count as the worst that says; if none does, a token for 4 bytes.
        """
        servers = list(servers)
        answers = await asyncio.gather(*(self.to_compute(server, path, headers, body) for server in servers))
        unknown = max((tokens for tokens in answers if tokens is not None), default=len(body) // 4)
        tokens_of = [unknown if tokens is None else tokens for tokens in answers]
        order = sorted(
            zip(answers, tokens_of, servers, strict=True),
            key=lambda each: (each[0] is None, each[1] + each[2].waiting),
        )
        return [(tokens, server) for _, tokens, server in order]

    async def forward(self, request: Request) -> Response:
        """Send a request to the best server that takes it, for as long as its client is there."""
        received = bytearray()
        async for piece in request.stream():
            received += piece
            if len(received) > MAX_BODY:
                return JSONResponse({"error": f"the body is refused: it has more than {MAX_BODY} bytes"}, 413)
        body = bytes(received)
        sending = asyncio.ensure_future(self.send(request, body))
        leaving = asyncio.ensure_future(request.receive())  # after the body comes only that the client is gone
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return sending.result() if sending.done() else Response()
        finally:
            leaving.cancel()
            sending.cancel()

    async def send(self, request: Request, body: bytes) -> Response:
        """Return the response of the best server that takes a request."""
        refused: Response = JSONResponse({"error": "no server answers"}, 503)
        for tokens, server in await self.ranked(self.servers, request.url.path, request.headers.raw, body):
            with contextlib.ExitStack() as computing:
                computing.enter_context(server.computing(tokens))
                sent = self.client.build_request(
                    request.method,
                    f"{server.url}{request.url.path}",
                    params=request.url.query,
                    content=body,
                    headers=passed_on(request.headers.raw),
                )
                with contextlib.suppress(httpx.TransportError):
                    response = await self.client.send(sent, stream=True)
                    if response.status_code not in (429, 503):
                        return self.answer(response, computing.pop_all())
                    content = b"".join([piece async for piece in response.aiter_raw()])
                    refused = Response(content, response.status_code)
                    refused.raw_headers += passed_on(response.headers.raw)
        return refused

    def answer(self, response: httpx.Response, computing: contextlib.ExitStack) -> Response:
        """Return a server's response as it comes in; with its first bytes the prompt has begun to be answered."""

        async def content() -> AsyncGenerator[bytes, None]:
            try:
                async for piece in response.aiter_raw():
                    computing.close()
                    yield piece
            finally:
                computing.close()
                await response.aclose()

        answer = StreamingResponse(content(), response.status_code)
        answer.raw_headers += passed_on(response.headers.raw)
        return answer


async def health(request: Request) -> Response:
    return Response()


def application(urls: list[str]) -> Starlette:
    """Return the router as an ASGI application."""
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
