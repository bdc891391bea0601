"""The Python client, blocking and asyncio, against the gRPC server on a fake engine."""

import asyncio
import json
import pickle
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import grpc
import pytest
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from starling.client import AsyncClient, Client, StarlingError, clients, requests
from starling.client.early_status import EarlyStatus
from starling.config.star import FIELD_OF
from starling.engine_ext.serving.grpc import messages
from starling.engine_ext.serving.grpc.auth import server_credentials
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, front_of
from tests.unit.engine_ext.serving.grpc.test_inference import DEADLINES

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
PIECED = "grün😀" * 30


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request):
    return request.param


class Call:
    """One call of a client: its events, its response or error, and the seconds it took."""

    def __init__(self, kind: str, engine: FakeEngine, method: str = "stream", front=None, **options) -> None:
        self.kind, self.engine, self.method, self.front, self.options = kind, engine, method, front or {}, options
        self.events: list[pb.GenerateStreamResponse] = []
        self.reply = self.error = None

    def __call__(self, *args, **fields) -> "Call":
        asyncio.run(self._over_front(args, fields))
        return self

    async def _over_front(self, args, fields) -> None:
        async with front_of(self.engine, **self.front) as front:
            started = time.monotonic()
            try:
                if self.kind == "blocking":
                    await asyncio.to_thread(self._block, front.address, args, fields)
                else:
                    await self._await(front.address, args, fields)
            except StarlingError as error:
                self.error = error
            self.seconds = time.monotonic() - started

    def _block(self, address, args, fields) -> None:
        with Client(address, **self.options) as client:
            answer = getattr(client, self.method)(*args, **fields)
            if self.method == "stream":
                for event in answer:
                    self.events.append(event)
            self.reply = answer

    async def _await(self, address, args, fields) -> None:
        async with AsyncClient(address, **self.options) as client:
            answer = getattr(client, self.method)(*args, **fields)
            if self.method != "stream":
                self.reply = await answer
                return
            async for event in answer:
                self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.WhichOneof("event") for event in self.events]


class FullAtFirst(FakeEngine):
    """Refuses the first ``times`` requests."""

    def __init__(self, times: int, *script) -> None:
        super().__init__(*script)
        self.times = times

    def check_admission(self, n: int) -> None:
        super().check_admission(n)
        if len(self.admitted) <= self.times:
            raise QueueOverflowError


@pytest.fixture
def soon(monkeypatch):
    """The server's pushback is 50 ms; without it the client would wait for 10 minutes before it calls again."""
    channel_options = clients.channel_options

    def with_long_waits(*args):
        made = dict(channel_options(*args))
        if config := json.loads(made.get("grpc.service_config", "{}")):
            config["methodConfig"][0]["retryPolicy"] |= {"initialBackoff": "600s", "maxBackoff": "600s"}
            made["grpc.service_config"] = json.dumps(config)
        return list(made.items())

    monkeypatch.setattr(clients, "channel_options", with_long_waits)
    monkeypatch.setattr(messages, "PUSHBACK", ("grpc-retry-pushback-ms", "50"))


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
        ("abc", [{"prompt": "abc"}]),
        ([5, 6], [{"prompt_token_ids": [5, 6]}]),
        ((5, 6), [{"prompt_token_ids": [5, 6]}]),
        (CHAT, [CHAT]),
    ],
    ids=["text", "ids", "tuple", "chat"],
)
@pytest.mark.parametrize("method", ["stream", "generate"])
def test_prompts(kind, method, prompt, rendered):
    engine = FakeEngine("ab", "c")
    call = Call(kind, engine, method)(prompt, max_tokens=7, stop="END", star={"mode": "on", "block_size": 64})
    assert call.error is None
    assert engine.rendered[0][0] == rendered
    params = engine.calls[0].params
    assert (params.max_tokens, params.stop) == (7, ["END"])
    assert params.extra_args == {"star": "on", "star_block_size": "64"}
    if method == "stream":
        assert call.kinds == ["delta", "delta", "final"]
        text = "".join(event.delta.text for event in call.events)
    else:
        text = call.reply.choices[0].text
        assert call.reply.usage.completion_tokens == 3
    assert text == "abc"


def test_tokenize_and_capabilities(kind):
    engine = FakeEngine()
    assert Call(kind, engine, "tokenize")("abc").reply.count == 10
    assert Call(kind, engine, "tokenize")(CHAT, add_generation_prompt=False).reply.count == 10
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
    monkeypatch.setattr("starling.client.early_status.WAIT_SECONDS", 0.01)
    failed = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, details="Internal error from Core")

    async def scenario():
        return await EarlyStatus(SimpleNamespace(add_done_callback=lambda _: None)).of(failed)

    assert asyncio.run(scenario()) is failed


@pytest.mark.parametrize(
    ("prompt", "what"), [(CHAT, "messages"), (["a head", "a question"], "several texts")], ids=["chat", "texts"]
)
def test_messages_and_texts_have_no_pieces(kind, monkeypatch, prompt, what):
    monkeypatch.setattr("starling.client.clients.SERVER_MESSAGE_BYTES", 20)
    with pytest.raises(ValueError, match=rf"{what} can.t be uploaded in pieces, .*Allowed: up to 20"):
        Call(kind, FakeEngine(), max_message_bytes=10)(prompt)


def test_a_list_of_texts_is_a_prompt_of_texts():
    sent = requests.generate_request(["head", "question"], {})
    assert sent == pb.GenerateStreamRequest(texts=pb.Texts(texts=["head", "question"]))
    with pytest.raises(TypeError, match=r"it is several texts\. Allowed: text or messages"):
        requests.tokenize_request(["head", "question"], None)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("method", "fields"),
    [("stream", {}), ("generate", {}), ("stream", {"upload": True})],
    ids=["stream", "one", "upload"],
)
def test_calls_are_retried_after_the_servers_pushback(kind, soon, method, fields, times):
    engine = FullAtFirst(times, "a")
    # Longer than gRPC's default retry buffer of 256 KiB: it would not retry the call, and uploads would abort.
    call = Call(kind, engine, method)("x" * 2**20, timeout=300, **fields)
    assert call.error is None, "it waits as long as the server says"
    assert len(engine.admitted) == times + 1 + bool(fields), "an upload is checked before and after it is received"
    assert len(engine.calls) == 1
    assert 0.05 * times * 0.8 < call.seconds


@pytest.mark.parametrize("retries", [0, 1])
def test_retries_end(kind, soon, retries):
    engine = FakeEngine(refuses=QueueOverflowError())
    error = Call(kind, engine, retries=retries)("abc").error
    assert (error.code, error.retry_after) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
    assert len(engine.admitted) == 1 + retries


@pytest.mark.parametrize("retries", [-1, 5])
def test_more_retries_than_grpc_supports_are_refused(retries):
    with pytest.raises(ValueError, match="0 to 4"):
        Client("localhost:1", retries=retries)


def test_nothing_is_repeated_after_an_event(kind):
    engine = FakeEngine("a", EngineDeadError())
    call = Call(kind, engine)("abc")
    assert (call.kinds, call.error.code) == (["delta"], grpc.StatusCode.UNAVAILABLE)
    assert len(engine.admitted) == 1


def test_the_deadline_holds_for_the_waits_too(kind, monkeypatch):
    monkeypatch.setattr(messages, "PUSHBACK", ("grpc-retry-pushback-ms", "1000000"))
    for seconds in DEADLINES:
        engine = FakeEngine(refuses=QueueOverflowError())
        call = Call(kind, engine)("abc", timeout=seconds)
        if engine.admitted:
            break
    assert call.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(engine.admitted) == 1


@pytest.mark.parametrize("method", ["stream", "generate"])
def test_the_deadline_ends_the_request(kind, method):
    for seconds in DEADLINES:
        engine = FakeEngine("a", None)
        call = Call(kind, engine, method)("abc", timeout=seconds)
        if engine.calls:
            break
    assert call.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(engine.ended) == 1


@pytest.mark.parametrize("way", ["break", "close"])
@pytest.mark.parametrize("upload", [False, True], ids=["message", "upload"])
def test_leaving_the_loop_ends_the_request(kind, way, upload):
    def first(client):
        if way == "break":
            for event in client.stream("abc", upload=upload):
                return event
        events = client.stream("abc", upload=upload)
        next(events)
        events.close()

    async def first_of(client):
        if way == "break":
            async for event in client.stream("abc", upload=upload):
                return event
        events = client.stream("abc", upload=upload)
        await anext(events)
        await events.aclose()

    async def scenario():
        engine = FakeEngine("a", None)
        async with front_of(engine) as front, asyncio.timeout(300):
            client = Client(front.address) if kind == "blocking" else AsyncClient(front.address)
            await (asyncio.to_thread(first, client) if kind == "blocking" else first_of(client))
            while not engine.ended:
                await asyncio.sleep(0.01)
            closing = client.close()
            if closing is not None:
                await closing

    asyncio.run(scenario())


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


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 1}, "temprature is refused.*Allowed: temperature, .*cache_salt"),
        ({"progress": True}, "progress is refused"),
        ({"text": "x"}, "text is refused"),
        ({"sampling": {}}, "sampling is refused"),
        ({"star": {"blocks": 3}}, "'blocks' is refused.*Allowed: mode, .*block_size"),
        ({"star": {"mode": "yes"}}, "'yes' is refused. Allowed: off, on, auto"),
        ({"star": {"shards": "maybe"}}, "star_shards='maybe' is refused. Allowed: off, on"),
        ({"temperature": "warm"}, "temperature='warm' is refused"),
        ({"top_k": -1}, "top_k=-1 is refused"),
        ({"add_generation_prompt": True}, "it is for a prompt of messages"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_are_refused(fields, says):
    """Before the call, and before the first event is requested."""
    with pytest.raises((TypeError, ValueError), match=says):
        Client("localhost:1").generate("abc", **fields)
    if "progress" not in fields:
        with pytest.raises((TypeError, ValueError), match=says):
            Client("localhost:1").stream("abc", **fields)


@pytest.mark.parametrize(
    "prompt", [None, 5, b"abc", CHAT[0], ["a", 5], [{"role": "user", "content": 1}], [{"say": "x"}]]
)
def test_prompts_of_unknown_kinds(prompt):
    with pytest.raises((TypeError, ValueError), match="refused"):
        requests.generate_request(prompt, {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0, "seed": None}, {"sampling": {"temperature": 0}}),
        ({"stop": ["a", "b"], "bad_words": "c"}, {"sampling": {"stop": ["a", "b"], "bad_words": ["c"]}}),
        ({"extra_args": {"big": 2**53 + 1}}, {"sampling": {"extra_args": '{"big": 9007199254740993}'}}),
        (
            {"structured_outputs": {"choices": ["yes", "no"]}},
            {"sampling": {"structured_outputs": {"choices": {"choices": ["yes", "no"]}}}},
        ),
        (
            {"structured_outputs": {"json_schema": {"type": "object"}}},
            {"sampling": {"structured_outputs": {"json_schema": '{"type": "object"}'}}},
        ),
        ({"star": {"star": "auto", "star_block_size": "n/4"}}, {"star": {"mode": "MODE_AUTO", "block_size": "n/4"}}),
        ({"star": "On", "star_block_size": 4096}, {"star": {"mode": "MODE_ON", "block_size": "4096"}}),
        ({"star": False}, {"star": {"mode": "MODE_OFF"}}),
        ({"star": {"anchor_size": 0}}, {"star": {"anchor_size": 0}}),
        ({"star": {"shards": "on"}}, {"star": {"shards": True}}),
        ({"star": {"star_shards": "off"}}, {"star": {"shards": False}}),
        ({"request_id": "r", "progress": True, "priority": 0}, {"request_id": "r", "progress": True, "priority": 0}),
    ],
)
def test_what_is_sent(fields, expected):
    assert requests.generate_request("abc", fields) == pb.GenerateStreamRequest(text="abc", **expected)


def test_names_are_the_servers():
    assert {name: "mode" if name == "star" else name.removeprefix("star_") for name in FIELD_OF} == FIELD_OF
    assert sorted({*requests.STAR} - {"segment_offsets"}) == sorted(FIELD_OF.values())
    assert list(requests.MODES) == ["off", "on", "auto"]


def test_both_streams_have_the_same_events():
    """The client reads the events of an upload as those of GenerateStream."""
    fields = [
        [(field.name, field.number, field.message_type) for field in message.DESCRIPTOR.fields]
        for message in (pb.GenerateStreamResponse, pb.GenerateUploadStreamResponse)
    ]
    assert fields[0] == fields[1]


def test_an_error_can_cross_processes():
    error = StarlingError(grpc.StatusCode.INVALID_ARGUMENT, "no", "sampling.top_p", None)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.field) == ("INVALID_ARGUMENT: no", error.code, "sampling.top_p")
