"""One `starling serve` under load and faults: many streams, cancels, slow readers, fuzzing, a long upload.

The server's log must have no prompts and no keys. The last test kills the engine's process.
"""

import asyncio
import random
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import grpc
import httpx
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.random_llama import make_tiny_llama
from benchmarks.soak import load, player
from benchmarks.soak.hostile import HOSTILE
from benchmarks.soak.mix import KINDS
from benchmarks.soak.series import Sampler
from benchmarks.soak.server import scores_options
from benchmarks.soak.target import Clients, Target
from examples.server import serving
from starling.client import AsyncClient, StarlingError
from starling.engine_ext.serving.grpc.messages import GRPC_CODES
from starling.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from starling.v1 import inference_pb2 as pb
from tests.e2e.fuzz import messages, mutated

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

KEY, ADMIN_KEY, SECRET = "key-of-the-api-8d1f", "key-of-the-admin-51c0", "words-of-a-prompt-97a2"
HOSTILE_KEY = "key-of-hostile-clients-77b3"
CREDENTIALS = (("authorization", f"Bearer {KEY}"),)
ADMIN = (("authorization", f"Bearer {ADMIN_KEY}"),)
STREAMS, AT_ONCE, WARM, ROUNDS = 400, 64, 200, 8
QUEUE = 300
TOKENS = 16
SERVICE = "/starling.v1.InferenceService"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    model = make_tiny_llama(folder / "tiny")
    options = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-num-batched-tokens", "1024"]
    options += [
        "--scheduling-policy",
        "priority",
        "--api-key",
        KEY,
        HOSTILE_KEY,
        "--live-page",
        "on",
        "--grpc-admin-key",
        ADMIN_KEY,
        "--max-num-queued-reqs",
        str(QUEUE),
    ]
    # The first 200 streams use all of so few pages. oneDNN would keep a primitive for each number of tokens of a step;
    # here it keeps none. So memory that grows after 200 streams is a leak.
    options += ["--num-gpu-blocks-override", "384", *scores_options(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
        with serving(model, *options, log=folder / "log") as server:
            yield server


def request(prompt: str = "abc", *, tokens: int = TOKENS, **sampling) -> pb.GenerateStreamRequest:
    chosen = pb.SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True} | sampling)
    return pb.GenerateStreamRequest(text=prompt, sampling=chosen)


def prompt(kind: int, length: int = 40) -> str:
    return "".join(chr(ord("a") + (kind * 7 + index * (kind + 3)) % 26) for index in range(length))


class Calls:
    """The server's stubs, on one channel in the running event loop."""

    def __init__(self, server, options=()) -> None:
        self.channel = grpc.aio.insecure_channel(server.grpc, options)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    async def __aenter__(self):
        return self

    async def read_rest(self, call) -> list[pb.GenerateStreamResponse]:
        """The events of a stream that have not been read yet."""
        events = []
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
        return events

    async def __aexit__(self, *_):
        await self.channel.close()

    def generate(self, message, **options):
        return self.stub.GenerateStream(message, metadata=CREDENTIALS, **options)

    async def read(self, message) -> tuple[list[int], pb.Final]:
        """Tokens and last event of a stream. Asserts that it ends with a final event whose usage is right."""
        tokens, final = [], None
        async for event in self.generate(message):
            assert final is None, "an event after the final one"
            kind = event.WhichOneof("event")
            tokens.extend(event.delta.token_ids)
            final = event.final if kind == "final" else None
        assert final is not None, "the stream ended without a final event"
        assert final.usage.completion_tokens == len(tokens)
        return tokens, final

    async def cache(self) -> admin_pb2.EngineCache:
        message = admin_pb2.GetCacheStateRequest(per_request=True)
        while (answer := await self.admin.GetCacheState(message, metadata=ADMIN)).unanswered:
            pass  # the server waits for an engine for 5 s
        (state,) = answer.engines
        return state

    async def idle(self) -> None:
        """Wait until no request runs, waits or holds a page; `run` limits the time of a whole scenario."""
        while (state := await self.cache()).requests_running or state.requests_waiting or state.pages_used:
            await asyncio.sleep(0.02)
        assert state.pages_cached + state.pages_free == state.pages_total


def run(server, scenario, options=()):
    async def main():
        async with Calls(server, options) as calls:
            return await asyncio.wait_for(scenario(calls), 900)

    return asyncio.run(main())


def resident(server) -> dict[str, int]:
    """Resident bytes of each of the server's processes, by process id."""
    process = psutil.Process(server.process.pid)
    return {str(each.pid): each.memory_info().rss for each in (process, *process.children(recursive=True))}


def test_a_thousand_streams_give_the_right_tokens_and_leak_no_memory(server):
    async def scenario(calls):
        expected = {kind: (await calls.read(request(prompt(kind))))[0] for kind in range(10)}
        assert len({tuple(tokens) for tokens in expected.values()}) == 10
        concurrent = asyncio.Semaphore(AT_ONCE)

        async def stream(index: int) -> bool:
            async with concurrent:
                tokens, _ = await calls.read(request(prompt(index % 10)))
            return tokens == expected[index % 10]

        async def all_right(streams: int) -> bool:
            right = await asyncio.gather(*map(stream, range(streams)))
            await calls.idle()
            return all(right)

        assert await all_right(WARM)
        memory, growth = resident(server), []
        while len(growth) < ROUNDS and not bounded(growth):
            assert await all_right(STREAMS)
            before, memory = memory, resident(server)
            growth.append({pid: (memory[pid] - before[pid]) / 2**20 for pid in memory})
        return growth

    def bounded(growth) -> bool:
        """Whether each process had a round in which it grew by less than 8 MiB: a leak grows in all of them.

        The first step with so many requests of these lengths may be in any round.
        """
        return len(growth) > 1 and all(min(each[pid] for each in growth) < 8 for pid in growth[0])

    growth = run(server, scenario)
    print("memory growth, MiB:", growth)
    assert bounded(growth), growth


def test_many_cancelled_requests_leave_no_page_and_no_request(server):
    chance = random.Random(0)

    async def scenario(calls):
        expected, _ = await calls.read(request(prompt(1)))

        async def cancelled(index: int) -> int:
            call = calls.generate(request(prompt(index, 1500), tokens=3000))
            events = 0
            with suppress(asyncio.CancelledError):
                for _ in range(chance.choice([0, 0, 1, 3, 20])):
                    await call.read()
                    events += 1
                await asyncio.sleep(chance.random() * 0.3)
            call.cancel()
            return events

        events = await asyncio.gather(*map(cancelled, range(200)))
        await calls.idle()
        after, _ = await calls.read(request(prompt(1)))
        return events, expected, after

    events, expected, after = run(server, scenario)
    assert 0 in events
    assert max(events) == 20
    assert after == expected


def test_a_deadline_frees_the_request(server):
    async def scenario(calls):
        call = calls.generate(request(tokens=8000), timeout=1)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in call:
                pass
        await calls.idle()
        return ended.value.code()

    assert run(server, scenario) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_slow_reader_gets_all_tokens_in_fewer_events(server):
    tokens = 600

    async def scenario(calls):
        expected, _ = await calls.read(request("slow", tokens=tokens))
        call = calls.generate(request("slow", tokens=tokens, logprobs=20))
        first = await call.read()
        await calls.idle()  # the engine is done; the events that the client has not read are merged
        return expected, [first, *await calls.read_rest(call)]

    # gRPC's own buffer for a client that does not read grows with the connection's speed. It is fixed at 64 KiB here.
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16)]
    expected, events = run(server, scenario, window)
    assert [token for event in events for token in event.delta.token_ids] == expected
    sizes = [len(event.delta.token_ids) for event in events]
    print(f"{len(events)} events, the largest of {max(sizes)} tokens")
    assert all(len(event.delta.logprobs) == size for event, size in zip(events, sizes, strict=True))
    assert len(events) < tokens / 2


def test_a_request_with_too_many_choices_is_refused_before_it_reaches_the_engine(server):
    async def scenario(calls):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await calls.read(request(n=QUEUE + 1, temperature=1))
        return refused.value, await calls.cache()

    error, state = run(server, scenario)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert rpc_status.from_call(error).details[0].Unpack(retry)
    assert retry.retry_delay.ToSeconds() > 0
    assert (state.requests_running, state.requests_waiting) == (0, 0)


def test_an_upload_of_a_million_tokens_is_refused_for_its_length_at_its_first_piece(server):
    async def scenario(_):
        async with AsyncClient(server.grpc, api_key=KEY) as client:
            with pytest.raises(StarlingError) as refused:
                await client.generate([5] * 1_000_000, upload=True, max_tokens=TOKENS)
            return refused.value

    error = run(server, scenario)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")
    assert error.message == "The prompt has 262144 token ids or more; the model's context has 8192."


def test_an_upload_gives_the_tokens_of_the_same_prompt_in_one_message(server):
    async def parts():
        yield pb.GenerateUploadStreamRequest(head=pb.GenerateStreamRequest(sampling=request().sampling))
        for piece in (prompt(3, 1000), prompt(4, 1000)):
            yield pb.GenerateUploadStreamRequest(text=piece)

    async def scenario(calls):
        expected, _ = await calls.read(request(prompt(3, 1000) + prompt(4, 1000)))
        events = [event async for event in calls.stub.GenerateUploadStream(parts(), metadata=CREDENTIALS)]
        return expected, [token for event in events for token in event.delta.token_ids]

    expected, uploaded = run(server, scenario)
    assert uploaded == expected


def test_a_soak_in_miniature_loses_no_request_and_leaves_no_page(server, tmp_path, monkeypatch):
    """Every kind of request of `make soak` twice, each attack once, and one sample of the processes."""
    monkeypatch.setattr(player, "DEADLINE_SECONDS", 600)
    monkeypatch.setattr(load, "wait_idle", partial(load.wait_idle, seconds=600))
    http = server.http.removeprefix("http://")
    keys = {"api_key": KEY, "admin_key": ADMIN_KEY, "hostile_key": HOSTILE_KEY}
    target = Target(http, server.grpc, server.model, server.process.pid, **keys, queue=QUEUE)

    (hostile,) = [kind for kind in KINDS if kind.name == "hostile"]

    async def scenario():
        async with Clients(target) as clients:
            plays = player.Player(clients, hold_seconds=0.5)
            await plays.learn_answers()
            await load.play_each(plays, 2)
            for each in HOSTILE:
                await plays.play(replace(hostile, play=partial(hostile.play, chosen=each)))
            left = await load.OpenLoop(plays, 1).rest()
            return plays.ledger, left, await Sampler(clients, tmp_path, 1).sample()

    ledger, left, sample = asyncio.run(asyncio.wait_for(scenario(), 900))
    assert (ledger.lost, ledger.requests) == (0, 2 * len(KINDS) + len(HOSTILE)), ledger.details
    assert ledger.checked >= 10
    assert not any(left.values()), left
    assert sample["processes"] >= 3
    assert {f"{name}: RSS" for name in ("starling", "EngineCore", "Worker of EngineCore")} <= sample.keys()


FUZZ = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods}
# DEADLINE_EXCEEDED comes from the client: a mutated message can request a long output.
CODES = {code for _, code in GRPC_CODES} - {grpc.StatusCode.INTERNAL}
CODES |= {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}


@pytest.fixture(scope="module")
def send(server):
    """A function that calls a method with bytes, and returns the status code of the call."""
    with grpc.insecure_channel(server.grpc) as channel:

        def code(name: str, data: bytes) -> grpc.StatusCode:
            method = METHODS[name]
            kind = f"{'stream' if method.client_streaming else 'unary'}_"
            kind += "stream" if method.server_streaming else "unary"
            call = getattr(channel, kind)(f"{SERVICE}/{name}")
            message = iter([data]) if method.client_streaming else data
            try:
                response = call(message, timeout=3, metadata=CREDENTIALS)
                if method.server_streaming:
                    for _ in response:
                        pass
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        yield code


def bounded(message):
    """The message with bounds on its tokens and choices, so that each call is short."""
    sampling = message.head.sampling if isinstance(message, pb.GenerateUploadStreamRequest) else message.sampling
    sampling.max_tokens = min(sampling.max_tokens, 4) if sampling.HasField("max_tokens") else 4
    if sampling.n < 2**31:
        sampling.n = min(sampling.n, 3)
    return message


counts: dict[grpc.StatusCode, int] = {}


def count(code: grpc.StatusCode) -> None:
    """Count a status code. Asserts that it is one of CODES."""
    counts[code] = counts.get(code, 0) + 1
    assert code in CODES, code


@settings(max_examples=1000, **FUZZ)
@given(message=messages(pb.GenerateStreamRequest.DESCRIPTOR))
def test_fuzz_messages(send, message):
    count(send("GenerateStream", bounded(message).SerializeToString()))


@settings(max_examples=200, **FUZZ)
@given(message=messages(pb.GenerateUploadStreamRequest.DESCRIPTOR))
def test_fuzz_uploads(send, message):
    if message.WhichOneof("part") == "head":
        bounded(message)
    count(send("GenerateUploadStream", message.SerializeToString()))


@settings(max_examples=200, **FUZZ)
@given(message=messages(pb.TokenizeRequest.DESCRIPTOR))
def test_fuzz_tokenize(send, message):
    count(send("Tokenize", message.SerializeToString()))


RICH = request(prompt(1), logprobs=2, stop=["zz"], seed=3)
RICH.star.mode = pb.StarOptions.MODE_ON
RICH.star.block_size = "32"


@settings(max_examples=600, **FUZZ)
@given(name=st.sampled_from(["Generate", "GenerateStream"]), data=mutated(RICH))
def test_fuzz_mutated(send, name, data):
    count(send(name, data))


@settings(max_examples=300, **FUZZ)
@given(name=st.sampled_from(sorted(METHODS)), data=st.binary(max_size=60))
def test_fuzz_bytes(send, name, data):
    count(send(name, data))


def test_fuzzed_calls_succeed_or_are_refused_and_the_server_still_works(server):
    """Runs after the fuzz tests."""
    print("codes:", {code.name: number for code, number in counts.items()})
    assert sum(counts.values()) >= 2000
    assert counts[grpc.StatusCode.OK] > 50
    assert counts[grpc.StatusCode.INVALID_ARGUMENT] > 500

    async def scenario(calls):
        await calls.idle()
        return await calls.read(request())

    assert len(run(server, scenario)[0]) == TOKENS
    assert httpx.get(f"{server.http}/health", timeout=300).status_code == 200


def test_the_log_has_no_prompt_and_no_key(server):
    async def scenario(calls):
        await calls.read(request(SECRET))
        bad = request(SECRET)
        bad.star.block_size = "7"
        for message in (bad, request(SECRET, top_p=7), request(SECRET * 1000)):
            with pytest.raises(grpc.aio.AioRpcError):
                await calls.read(message)

    run(server, scenario)
    body = {"model": server.model, "prompt": SECRET, "max_tokens": 2, "vllm_xargs": {"star_block_size": 7}}
    credentials = {"authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{server.http}/v1/completions", json=body, headers=credentials, timeout=300)
    assert response.status_code == 400
    log = server.log.read_text()
    assert "gRPC on 127.0.0.1:" in log
    for word in (KEY, HOSTILE_KEY, ADMIN_KEY, SECRET):
        assert word not in log, word


def test_a_killed_engine_makes_calls_unavailable_and_the_server_exit_with_1(server):
    """The last test: it ends the server."""

    async def scenario(calls):
        watched = health_pb2_grpc.HealthStub(calls.channel).Watch(health_pb2.HealthCheckRequest())
        status = [(await watched.read()).status]
        call = calls.generate(request(tokens=8000))
        # The test does not wait for the first token, which is late if the engine and its worker use all cores.
        await asyncio.sleep(1)
        children = psutil.Process(server.process.pid).children(recursive=True)
        engines = [child for child in children if any("EngineCore" in word for word in child.cmdline())]
        assert engines, [child.cmdline() for child in children]
        for engine in engines:
            engine.kill()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await calls.read_rest(call)
        status.append((await watched.read()).status)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await calls.read(request())
        return status, ended.value.code(), refused.value.code()

    status, running, new = run(server, scenario)
    assert status == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    assert (running, new) == (grpc.StatusCode.UNAVAILABLE,) * 2
    started = time.monotonic()
    assert server.process.wait(300) == 1
    print(f"ended {time.monotonic() - started:.1f} s after")
