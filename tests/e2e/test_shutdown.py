"""SIGTERM while requests run that outlast `--shutdown-timeout`: each gets an end, and the server exits in time."""

import json
import signal
import socket
import subprocess
import threading
from contextlib import suppress

import grpc
import httpx
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import Server, serving
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.e2e.serving import LONG, MODEL, running
from tests.e2e.wait import wait_until

pytestmark = pytest.mark.e2e

FOREVER = {"model": MODEL, "temperature": 0, "max_tokens": 7000, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "abc"}]
BODIES = {
    "completion": ("/v1/completions", {"prompt": "abc"}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "choices": ("/v1/completions", {"prompt": "abc", "n": 3, "temperature": 1}),
    "beams": ("/v1/completions", {"prompt": "abc", "n": 2, "use_beam_search": True}),
    "stream": ("/v1/completions", {"prompt": "abc", "stream": True}),
    "chat stream": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
}


class Client(threading.Thread):
    """One request; `end` says what became of it."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.server, self.end = server, "silence"
        self.start()

    def run(self) -> None:
        if self.name == "gRPC":
            with grpc.insecure_channel(self.server.grpc) as channel, suppress(grpc.RpcError):
                for _ in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
                    pb.GenerateStreamRequest(text="abc", sampling=LONG)
                ):
                    pass
            self.end = "gRPC"
            return
        path, fields = BODIES[self.name]
        try:
            response = httpx.post(self.server.http + path, json=FOREVER | fields, timeout=300)
            self.end = f"{response.status_code} {response.text.strip().splitlines()[-1]}"
        except httpx.TransportError as error:
            self.end = repr(error)


def half_a_request(server: Server) -> socket.socket:
    """A connection whose request lacks its end."""
    host, _, port = server.http.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=300)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{")
    return connection


def unread_stream(server: Server) -> socket.socket:
    """A connection whose client reads nothing of an endless stream."""
    host, _, port = server.http.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    body = json.dumps(FOREVER | {"prompt": "abc", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_every_request_ends_and_so_does_the_server(tmp_path):
    model = make_tiny_llama(tmp_path / MODEL, num_hidden_layers=6)
    options = ["--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--shutdown-timeout", "1"]
    with serving(model, *options, log=tmp_path / "log") as server:
        clients = [Client(server, name) for name in (*BODIES, "gRPC")]
        with httpx.Client(base_url=server.http, timeout=300) as http:
            half, unread = half_a_request(server), unread_stream(server)
            assert wait_until(lambda: running(http) >= 7), [each.end for each in clients]  # beams come and go
        server.process.send_signal(signal.SIGTERM)
        try:
            assert server.process.wait(60) == 0, server.log.read_text(errors="replace")
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server still runs: {[(each.name, each.end) for each in clients if each.is_alive()]}")
        for each in clients:
            each.join(60)
        ends = {each.name: each.end for each in clients}
        assert {name for name, end in ends.items() if "silence" in end or "Error(" in end} == set(), ends
        # Some may have come to their end while the engine was stopping.
        refused = [json.loads(end[4:])["error"]["message"] for end in ends.values() if end.startswith("503 ")]
        assert refused and all("shutting down" in message for message in refused), ends
        for name in ("stream", "chat stream"):
            assert ends[name] == "200 data: [DONE]" or json.loads(ends[name][10:])["error"]["code"] == 503, ends
        assert half.recv(4096).startswith(b"HTTP/1.1 503 ")
        half.close()
        unread.close()
        assert "Traceback" not in server.log.read_text(errors="replace")
