"""The bound of a request's head, with uvicorn's own server on a socket."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from starling.engine_ext.front.bounds import HEAD
from starling.vllm_compat.server_socket import bound_request_heads


async def answer(request):
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(scope="module")
def port():
    bound_request_heads(HEAD.limit)
    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http="httptools", log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def answers(port: int, *parts: bytes) -> bytes:
    """What a server answers to the parts of requests until it closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while data := connection.recv(65536):
                received += data
        except ConnectionError:  # the server has closed it while parts were being sent
            pass
    return received


START = b"GET / HTTP/1.1\r\nhost: a\r\n"


def test_a_head_below_the_bound_is_answered(port):
    long = b"x: " + b"a" * (HEAD.limit - 1000) + b"\r\n"
    assert b" 200 " in answers(port, START + b"connection: close\r\n" + long + b"\r\n")


@pytest.mark.parametrize(
    "rest",
    [b"x: a\r\n" * 20_000, b"x: " + b"a" * HEAD.limit, b"x: " + b"a" * 2**20],
    ids=["many headers", "a long one", "a longer one"],
)
def test_a_head_above_the_bound_is_refused_though_it_has_no_end(port, rest):
    received = answers(port, START, *(rest[at : at + 4096] for at in range(0, len(rest), 4096)))
    assert not received or received.startswith(b"HTTP/1.1 400 ")
    assert b" 200 " not in received


def test_a_long_line_is_refused(port):
    received = answers(port, b"GET /" + b"a" * 2 * HEAD.limit)
    assert not received or received.startswith(b"HTTP/1.1 400 ")


def test_a_long_body_is_no_head(port):
    body = b"a" * 2**20
    head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert answers(port, head, body).endswith(b"%d" % len(body))
    chunks = b"".join(b"400\r\n" + b"a" * 1024 + b"\r\n" for _ in range(1024))
    head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    assert answers(port, head, chunks, b"0\r\n\r\n").endswith(b"%d" % 2**20)


def test_trailers_have_the_bound_too(port):
    head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    received = answers(port, head, *[b"x: a\r\n" * 500] * 100)
    assert b" 200 " not in received


def test_requests_one_after_the_other_have_a_head_each(port):
    head = START + b"x: " + b"a" * 1000 + b"\r\n\r\n"
    last = START + b"connection: close\r\n\r\n"
    assert answers(port, head * 200 + last).count(b" 200 ") == 201
