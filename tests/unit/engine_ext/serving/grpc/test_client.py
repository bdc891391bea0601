"""The Python client, blocking and asyncio, against the gRPC server on a fake engine."""

import asyncio
import pickle
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import grpc
import pytest

from examples.server import free_ports
from starling.client import AsyncClient, Client, ConnectError, clients, requests
from starling.client.channel import EarlyStatus
from starling.engine_ext.serving.grpc.auth import server_credentials
from tests.unit.engine_ext.serving.grpc.client_calls import CHAT, Call
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine

PIECED = "grün😀" * 30


def test_it_needs_no_vllm():
    """It needs only grpcio, protobuf and googleapis-common-protos; typing_extensions comes with grpcio."""
    check = """
import sys
# The second line: packages that grpcio imports where they are installed.
for name in ("vllm", "torch", "pydantic", "engine_ext", "attention_backends", "scheduler", "grpc_status",
             "grpc_health", "grpc_reflection", "grpc_tools"):
    sys.modules[name] = None
before = set(sys.modules)
import starling.client
tops = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(name for name in tops if not name.lstrip("_").startswith("cython")))
"""
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=300)
    assert set(result.stdout.split()) - {"typing_extensions"} == {"google", "grpc", "starling"}


@pytest.mark.parametrize(
    ("prompt", "rendered"),
    [
        ({"prompt": "abc"}, [{"prompt": "abc"}]),
        ({"prompt": [5, 6]}, [{"prompt_token_ids": [5, 6]}]),
        ({"prompt": (5, 6)}, [{"prompt_token_ids": [5, 6]}]),
        ({"messages": CHAT}, [CHAT]),
    ],
    ids=["text", "ids", "tuple", "chat"],
)
@pytest.mark.parametrize("method", ["stream", "generate"])
def test_prompts(kind, method, prompt, rendered):
    engine = FakeEngine("ab", "c")
    call = Call(kind, engine, method)(**prompt, max_tokens=7, stop="END", star={"mode": "on", "block_size": 64})
    assert call.error is None
    assert engine.rendered[0][0] == rendered
    params = engine.calls[0].params
    assert (params.max_tokens, params.stop) == (7, ["END"])
    assert params.extra_args == {"star": "on", "star_block_size": "64"}
    if method == "stream":
        assert call.kinds == ["delta", "delta", "final"]
        text = "".join(event.text for event in call.events[:-1])
        assert (call.events[-1].finish_reason, call.events[-1].usage.completion_tokens) == ("length", 3)
    else:
        text = call.reply.text
        assert call.reply.usage.completion_tokens == 3
        assert (call.reply.plan.attention, call.reply.choices[0].finish_reason) == ("dense", "length")
    assert text == "abc"


def test_tokenize_and_capabilities(kind):
    engine = FakeEngine()
    assert Call(kind, engine, "tokenize")("abc").reply.count == 10
    assert Call(kind, engine, "tokenize")(messages=CHAT, add_generation_prompt=False).reply.count == 10
    assert engine.rendered[0][1].chat_template_kwargs["add_generation_prompt"] is False
    assert Call(kind, engine, "capabilities")().reply.max_upload_bytes == 512 * 2**20
    with pytest.raises(TypeError, match="token ids already"):
        Call(kind, engine, "tokenize")([1])


@pytest.mark.parametrize("method", ["stream", "generate"])
@pytest.mark.parametrize(
    ("prompt", "fields", "options", "parts"),
    [
        ("x" * 500, {}, {"max_message_bytes": 600}, 0),
        ("x" * 500, {}, {"max_message_bytes": 400}, 1 + 32),
        (PIECED, {"upload": True}, {}, 1 + 10),
        (list(range(100)), {"upload": True, "max_tokens": 3}, {}, 1 + 7),
        (list(range(300)), {}, {"max_message_bytes": 400}, 1 + 19),
        ("", {"upload": True}, {}, 1),
    ],
    ids=["fits", "text too long", "text upload", "ids upload", "ids too long", "empty"],
)
def test_a_long_prompt_goes_up_in_pieces(kind, monkeypatch, method, prompt, fields, options, parts):
    sent = []

    def pieces(request):
        for part in requests.upload_parts(request):
            sent.append(part.ByteSize())
            yield part

    monkeypatch.setattr(clients, "upload_parts", pieces)
    monkeypatch.setattr(requests, "PIECE_BYTES", 64)
    engine = FakeEngine("ab", "c")
    call = Call(kind, engine, method, **options)(prompt, **fields)
    assert len(sent) == parts
    assert all(size < 64 + 8 for size in sent)
    if not prompt:
        assert (call.error.code, call.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")
        return
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    assert engine.rendered[0][0] == [{key: prompt}]
    assert engine.calls[0].params.max_tokens == fields.get("max_tokens", 990)
    if method == "stream":
        assert call.kinds == ["delta", "delta", "final"]
    else:
        assert (call.reply.choices[0].text, call.reply.usage.prompt_tokens) == ("abc", 10)


def test_an_upload_is_refused_by_the_heads_field(kind):
    call = Call(kind, FakeEngine())("abc", upload=True, top_p=2)
    assert (call.error.code, call.error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p")


def causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        assert cause not in found, "an error is its own cause"
        found.append(cause)
    return found


@pytest.mark.parametrize("upload", [False, True], ids=["message", "upload"])
def test_an_error_is_not_its_own_cause(kind, upload):
    assert len(causes(Call(kind, FakeEngine())("abc", upload=upload, top_p=2).error)) == 2


@pytest.mark.parametrize("retries", [0, 4])
def test_an_upload_is_refused_before_its_end(kind, retries):
    """The pieces exceed what a connection holds, so one is being written when the server refuses the upload."""
    error = Call(kind, FakeEngine(), retries=retries)([5] * 2_000_000, upload=True).error
    assert causes(error)[-1].__cause__ is None
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.field, error.retry_after) == ("token_ids", None)
    assert error.message == "The prompt has 262144 token ids or more; the model's context has 1000."


@pytest.mark.parametrize("server_first", [True, False], ids=["server first", "write first"])
def test_a_failed_write_does_not_hide_the_servers_status(server_first):
    """grpc.aio may note the failed write before or after the server's status."""
    failed = (grpc.StatusCode.INTERNAL, "Internal error from Core")
    refused = (grpc.StatusCode.INVALID_ARGUMENT, "too long")

    class AioCall:
        async def code(self):
            return self.status[0]

        async def details(self):
            return self.status[1]

        async def trailing_metadata(self):
            return grpc.aio.Metadata(("a", "b"))

        def add_done_callback(self, callback):
            self.callback = callback

        def end(self, status):
            self.status = status
            self.callback(self)

    async def scenario():
        call = AioCall()
        status = EarlyStatus(call)
        first, second = (refused, failed) if server_first else (failed, refused)
        call.end(first)
        waiting = asyncio.ensure_future(status.of(grpc.aio.AioRpcError(failed[0], details=failed[1])))
        await asyncio.sleep(0)
        call.end(second)
        return await waiting

    error = asyncio.run(scenario())
    assert (error.code(), error.details(), error.trailing_metadata()["a"]) == (*refused, "b")


def test_a_failed_write_without_a_status_of_the_server_is_reported(monkeypatch):
    monkeypatch.setattr("starling.client.channel.WAIT_SECONDS", 0.01)
    failed = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, details="Internal error from Core")

    async def scenario():
        return await EarlyStatus(SimpleNamespace(add_done_callback=lambda _: None)).of(failed)

    assert asyncio.run(scenario()) is failed


@pytest.mark.parametrize(
    ("prompt", "what"),
    [({"messages": CHAT}, "messages"), ({"prompt": ["a head", "a question"]}, "several texts")],
    ids=["chat", "texts"],
)
def test_messages_and_texts_have_no_pieces(kind, monkeypatch, prompt, what):
    monkeypatch.setattr("starling.client.clients.SERVER_MESSAGE_BYTES", 20)
    with pytest.raises(ValueError, match=rf"{what} can.t be uploaded in pieces, .*Allowed: up to 20"):
        Call(kind, FakeEngine(), max_message_bytes=10)(**prompt)


@pytest.mark.parametrize(("key", "fine"), [(None, False), ("wrong", False), ("right", True)])
def test_api_key(kind, key, fine):
    for method in ("stream", "generate", "capabilities"):
        call = Call(kind, FakeEngine("a"), method, front={"api_keys": ["right"]}, api_key=key)
        call(*(("abc",) if method != "capabilities" else ()))
        assert call.error is None if fine else call.error.code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("mutual", [False, True], ids=["TLS", "mTLS"])
@pytest.mark.parametrize("way", ["trusted", "not trusted", "plain text"])
def test_tls(kind, certificates, mutual, way):
    cert, key = (path.read_bytes() for path in certificates)
    path = str(certificates[0])
    args = Namespace(ssl_certfile=path, ssl_keyfile=str(certificates[1]), enable_ssl_refresh=False)
    args.ssl_ca_certs, args.ssl_cert_reqs = (path, 2) if mutual else (None, 0)
    front = {"credentials": server_credentials(args)}
    own = {"certificate": (cert, key)} if mutual else {}
    options = {"trusted": {"tls": cert, **own}, "not trusted": {"tls": True, **own}, "plain text": {}}[way]
    error = Call(kind, FakeEngine("a"), front=front, retries=0, **options)("abc", timeout=300).error
    assert error is None if way == "trusted" else error.code is grpc.StatusCode.UNAVAILABLE
    if way == "not trusted":
        assert "can't connect to" in str(error) and "handshake" in str(error).lower()


@pytest.mark.parametrize("method", ["stream", "generate", "capabilities"])
@pytest.mark.parametrize("options", [{"timeout": 0.5}, {}], ids=["deadline", "refused"])
def test_a_server_that_is_not_there_is_named(kind, method, options):
    (port,) = free_ports(0)
    address = f"127.0.0.1:{port}"
    prompt = () if method == "capabilities" else ("abc",)

    def block():
        with Client(address, retries=1) as client:
            answer = getattr(client, method)(*prompt, **options)
            next(answer)

    async def wait():
        async with AsyncClient(address, retries=1) as client:
            answer = getattr(client, method)(*prompt, **options)
            await (anext(answer) if method == "stream" else answer)

    with pytest.raises(ConnectError) as refused:
        block() if kind == "blocking" else asyncio.run(wait())
    assert str(refused.value).startswith(f"can't connect to {address} (is the server running with --grpc-port?)")
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
