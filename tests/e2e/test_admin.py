"""AdminService and prefill progress on one engine, with AsyncLLM, gRPC and the OpenAI application in this process."""

from __future__ import annotations

import asyncio
import functools
import json
from contextlib import aclosing

import grpc
import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams

from benchmarks.random_llama import make_tiny_llama
from examples.server import ENVIRONMENT
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.progress import ProgressPoller
from starling.engine_ext.front.requests import RequestPlanner
from starling.engine_ext.serving.grpc import admin
from starling.engine_ext.serving.grpc.messages import DrainingError
from starling.engine_ext.start import plugin
from starling.scheduler.planning.plan import StarPlan, blocks_done
from starling.v1 import admin_pb2 as pb
from starling.v1 import admin_pb2_grpc, inference_pb2_grpc
from starling.v1 import inference_pb2 as inference
from starling.vllm_compat.front import call_engine_core

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

PAGE_SIZE = 32
LENGTH = 7000  # prompt tokens: 55 steps of up to 128
RUNS = 50  # of a request whose steps are looked at: a busy machine may show few of them in one run
BLOCKS = {"star": "on", "star_block_size": 1024, "star_query_tokens": 100}
SMALL_BLOCKS = {"star": "on", "star_block_size": 64, "star_query_tokens": 100}


class Server:
    """The engine and its fronts in one event loop."""

    async def start(self, model) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_app
        from vllm.v1.engine.async_llm import AsyncLLM

        from starling.engine_ext.serving.cli.serve_args import AdminOptions, parse
        from starling.engine_ext.serving.grpc.server import Front

        plugin.register()
        options = ["--dtype", "float32", "--block-size", str(PAGE_SIZE), "--max-num-batched-tokens", "128"]
        args, _ = parse([str(model), "--enforce-eager", "--served-model-name", "tiny", *options])
        args.model = str(model)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        self.front = Front(self.engine, [], admin=AdminOptions(0, "localhost", None))
        port = await self.front.start("localhost:0", None)
        self.admin_channel = grpc.aio.insecure_channel(f"localhost:{self.front.admin_port}")
        self.channel = grpc.aio.insecure_channel(f"localhost:{port}")
        self.admin = admin_pb2_grpc.AdminServiceStub(self.admin_channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        tasks = await self.engine.get_supported_tasks()
        app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, args, tasks)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=300)

    async def stop(self) -> None:
        await self.http.aclose()
        await self.channel.close()
        await self.admin_channel.close()
        await self.front.stop(0)
        self.engine.shutdown()

    def generate(self, name: str, *, seed: int = 0, max_tokens: int = 4, **extra):
        prompt = {"prompt_token_ids": [(seed * 31 + index * index) % 250 for index in range(LENGTH)]}
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args=extra or None,
            output_kind=RequestOutputKind.DELTA,
        )
        return self.engine.generate(prompt, params, name)

    async def run_to_end(self, name: str, **options) -> tuple[int, str]:
        """Return the number of generated tokens and the finish reason."""
        tokens, reason = 0, None
        async for output in self.generate(name, **options):
            tokens += len(output.outputs[0].token_ids)
            reason = output.outputs[0].finish_reason
        return tokens, reason

    async def cache(self, per_request: bool = True) -> pb.EngineCache:
        """The cache state of the engine. Asserts that its page counts add up."""
        (state,) = (await self.admin.GetCacheState(pb.GetCacheStateRequest(per_request=per_request))).engines
        assert state.pages_used + state.pages_cached + state.pages_free == state.pages_total
        assert sum(group.pages_used for group in state.groups) == state.pages_used
        return state

    async def idle(self) -> pb.EngineCache:
        """Wait until no request runs, waits or holds a page: aborts take effect in the engine's next step."""
        async with asyncio.timeout(300):
            while (state := await self.cache()).requests_running or state.requests_waiting or state.pages_used:
                pass
        return state


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def server(runner, tmp_path_factory):
    model = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admin, "ANSWER_SECONDS", 300)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        runner.run(server.start(model))
        try:
            yield server
        finally:
            runner.run(server.stop())


def test_server_info(runner, server):
    async def scenario():
        return await server.admin.GetServerInfo(pb.GetServerInfoRequest())

    info = runner.run(scenario())
    assert info.models == ["tiny"]
    assert info.attention_backends == ["CPU_ATTN"]
    assert info.star_defaults.mode == inference.StarOptions.MODE_OFF
    assert (info.limits.max_model_tokens, info.limits.max_step_tokens) == (8192, 128)
    assert not info.limits.HasField("max_queued_requests")
    assert (info.draining, list(info.refused_features)) == (False, [])


def test_cache_state_during_and_after_a_request(runner, server):
    async def scenario():
        await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())
        states = []
        running = asyncio.create_task(server.run_to_end("mine", **BLOCKS))
        while not running.done():
            states.append(await server.cache())
        seen = [state.requests[0] for state in states if state.requests_running]  # it waits for its first step before
        return seen, await server.idle(), await running

    for _ in range(RUNS):
        seen, after, end = runner.run(scenario())
        if len({request.computed_tokens for request in seen}) > 5:
            break
    assert end == (4, "length")
    (group,) = after.groups
    assert (group.kind, group.layers, group.page_tokens, group.page_states) == (
        "full_attention",
        2,
        PAGE_SIZE,
        PAGE_SIZE,
    )
    assert group.page_bytes == 2 * 2 * PAGE_SIZE * 64 * 4, "layers, K and V, tokens, values, bytes"
    assert (group.tokens_per_state, group.compression) == (1, 1)
    assert {(request.request_id, request.status, request.prompt_tokens) for request in seen} == {
        ("mine", "running", LENGTH)
    }
    computed = [request.computed_tokens for request in seen]
    assert computed == sorted(computed)
    assert len(set(computed)) > 5
    for request in seen:
        (held,) = request.groups
        assert held.states == request.computed_tokens <= held.pages * PAGE_SIZE
    assert after.pages_cached == LENGTH // PAGE_SIZE
    assert after.pages_free == after.pages_total - after.pages_cached


def test_a_reset_empties_the_prefix_cache_unless_a_request_runs(runner, server):
    async def scenario():
        cached = []
        for reset in (False, True):
            if reset:
                assert (await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())).reset
                assert (await server.cache()).pages_cached == 0
            async with aclosing(server.generate("again", max_tokens=1000, **BLOCKS)) as outputs:
                await anext(outputs)
                (request,) = (await server.cache()).requests
                cached.append(request.cached_tokens)
                assert not (await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())).reset, "a request runs"
            await server.idle()
        return cached

    assert runner.run(scenario()) == [LENGTH // PAGE_SIZE * PAGE_SIZE, 0]


def test_an_abort_frees_all_pages(runner, server):
    async def scenario():
        names = [f"request-{index}" for index in range(6)]
        running = [
            asyncio.create_task(server.run_to_end(name, seed=index + 1, max_tokens=1000))
            for index, name in enumerate(names)
        ]
        while (await server.cache()).requests_running < 2:
            pass
        response = await server.admin.Abort(pb.AbortRequest(request_ids=[*names, "unknown"]))
        ends = [reason for _, reason in await asyncio.gather(*running)]
        return response, names, ends, await server.idle()

    response, names, ends, after = runner.run(scenario())
    assert (list(response.found), list(response.unknown)) == (names, ["unknown"])
    assert ends == ["abort"] * 6
    assert (after.pages_used, list(after.requests)) == (0, [])


@pytest.mark.parametrize("star", [BLOCKS, {}], ids=["star", "dense"])
def test_progress_grows_to_the_whole_prompt(runner, server, star):
    async def scenario():
        await server.idle()
        await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())
        poller = front_state(server.engine).poller
        async with aclosing(poller.watch(server.engine, "watched", 0.02)) as states:
            running = asyncio.create_task(server.run_to_end("watched", max_tokens=200, **star))
            seen = [state async for state in states]
        await server.engine.abort("watched")
        await running
        assert poller.watches == set()
        return seen

    for _ in range(RUNS):
        seen = runner.run(scenario())
        computed = [state.computed for state in seen]
        if len(computed) > 1 and computed[-1] == LENGTH:
            break
    assert len(computed) > 1
    assert computed == sorted(set(computed))
    assert computed[-1] == LENGTH
    assert {(state.prompt, state.cached) for state in seen} == {(LENGTH, 0)}
    if star:
        plan = StarPlan(1024, 1024, 0, LENGTH - 100, LENGTH)
        assert {(state.context, state.star_blocks) for state in seen} == {(plan.context_end, 7)}
        assert [state.star_blocks_done for state in seen] == [blocks_done(plan, done) for done in computed]
    else:
        assert {(state.context, state.star_blocks, state.star_blocks_done) for state in seen} == {(0, 0, 0)}


@pytest.fixture
def fast_polls(monkeypatch):
    """Poll progress often enough for a tiny model."""
    monkeypatch.setattr(ProgressPoller, "watch", functools.partialmethod(ProgressPoller.watch, interval=0.02))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_progress_over_http(runner, server, path, fast_polls):
    text = "".join(chr(97 + (index * index + len(path)) % 26) for index in range(6000))
    prompt = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    body = {"model": "tiny", "max_tokens": 3, "ignore_eos": True, "stream": True, **prompt}

    async def scenario():
        plain = await server.http.post(path, json=body | {"temperature": 0})
        await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())
        with_progress = await server.http.post(
            path, json=body | {"temperature": 0, "vllm_xargs": BLOCKS}, headers={"x-starling-progress": "true"}
        )
        return plain, with_progress

    for _ in range(RUNS):
        plain, with_progress = runner.run(scenario())
        assert plain.status_code == with_progress.status_code == 200, with_progress.text
        assert "starling-progress" not in plain.text
        events = with_progress.text.removesuffix("\n\n").split("\n\n")
        comments = [event for event in events if event.startswith(": ")]
        if len(comments) > 1:
            break
    assert events[: len(comments)] == comments, "before the first data"
    assert all(event.startswith("data: ") for event in events[len(comments) :])
    assert len(comments) > 1
    states = [json.loads(line.removeprefix(": starling-progress ")) for line in comments]
    computed = [state["computed"] for state in states]
    assert computed == sorted(set(computed))
    assert {(state["prompt_index"], state["star_blocks"]) for state in states} == {(0, 6)}
    assert [event.split('"object"')[0][:10] for event in events[len(comments) :]][-1] == "data: [DON"


def whole_output(events) -> tuple[str, list[int]]:
    """Text and tokens of a stream; on a busy machine, a delta may have several tokens."""
    deltas = [event.delta for event in events if event.HasField("delta")]
    return "".join(delta.text for delta in deltas), [token for delta in deltas for token in delta.token_ids]


def test_progress_over_grpc(runner, server, fast_polls):
    """Progress comes before the first delta and does not change the output; a cancel ends the request."""

    def request(progress: bool) -> inference.GenerateStreamRequest:
        ids = inference.TokenIds(ids=[(index * index) % 250 for index in range(LENGTH)])
        sampling = inference.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        star = inference.StarOptions(mode=inference.StarOptions.MODE_ON, block_size="1024", query_tokens=100)
        return inference.GenerateStreamRequest(token_ids=ids, sampling=sampling, star=star, progress=progress)

    async def scenario():
        streams = []
        for progress in (True, False):
            await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())
            streams.append([event async for event in server.inference.GenerateStream(request(progress))])
        await server.admin.ResetPrefixCache(pb.ResetPrefixCacheRequest())
        call = server.inference.GenerateStream(request(True))
        first = await call.read()
        call.cancel()
        return *streams, first, await server.idle()

    for _ in range(RUNS):
        events, plain, first, after = runner.run(scenario())
        states = [event.progress for event in events if event.HasField("progress")]
        if len(states) > 1 and first.HasField("progress"):
            break
    assert first.HasField("progress"), "the cancelled call was in its prefill"
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[: len(states)] == ["progress"] * len(states)
    computed = [state.computed_tokens for state in states]
    assert len(computed) > 1
    assert computed == sorted(set(computed))
    assert {(state.prompt_tokens, state.star_blocks, state.context_tokens) for state in states} == {
        (LENGTH, 7, LENGTH - 100)
    }
    assert whole_output(events) == whole_output(plain)
    assert "progress" not in {event.WhichOneof("event") for event in plain}
    assert (after.pages_used, after.requests_running) == (0, 0)


def test_a_call_of_an_unknown_engine_core_utility_fails(runner, server):
    with pytest.raises(Exception, match="starling_nothing"):
        runner.run(call_engine_core(server.engine, 0, "starling_nothing"))


def over_http(path: str, **body):
    async def send(server) -> None:
        response = await server.http.post(path, json={"model": "tiny", "vllm_xargs": SMALL_BLOCKS} | body)
        assert response.status_code == 200, response.text
        assert response.headers.get_list("x-starling-plan")

    return send


async def over_grpc(server) -> None:
    ids = inference.TokenIds(ids=[index % 250 for index in range(300)])
    request = {"token_ids": ids, "sampling": inference.SamplingParams(max_tokens=2, n=2), "star": GRPC_BLOCKS}
    await server.inference.Generate(inference.GenerateRequest(**request))
    async for _ in server.inference.GenerateStream(inference.GenerateStreamRequest(progress=True, **request)):
        pass


async def from_python(server) -> None:
    await server.run_to_end("with tokens", **SMALL_BLOCKS)
    params = SamplingParams(max_tokens=2, extra_args=dict(SMALL_BLOCKS))
    async for _ in server.engine.generate({"prompt": "text" * 100}, params, "with text"):
        pass


GRPC_BLOCKS = inference.StarOptions(mode=inference.StarOptions.MODE_ON, block_size="64")
TEXT, CHAT = "ab" * 200, [{"role": "user", "content": "ab" * 200}]


@pytest.mark.parametrize(
    ("send", "prompts"),
    [
        (over_http("/v1/completions", prompt=TEXT, max_tokens=2), 1),
        (over_http("/v1/completions", prompt=[TEXT, "b" + TEXT], max_tokens=2, stream=True), 2),
        (over_http("/v1/completions", prompt=TEXT, max_tokens=2, n=2), 1),
        (over_http("/v1/chat/completions", messages=CHAT, max_tokens=2), 1),
        (over_http("/v1/responses", input=TEXT, max_output_tokens=2), 1),
        (over_grpc, 2),
        (from_python, 2),
    ],
    ids=["completion", "two prompts, streamed", "n", "chat", "responses", "grpc", "python"],
)
def test_each_prompt_is_planned_once(runner, server, send, prompts, monkeypatch):
    plans, plan = [], RequestPlanner.plan

    def counted(self, *args):
        plans.append(plan(self, *args))
        return plans[-1]

    monkeypatch.setattr(RequestPlanner, "plan", counted)
    runner.run(send(server))
    assert len(plans) == prompts
    assert all(planned.plan is not None for planned in plans), "planned as star"


def test_a_drain_lets_running_requests_end_and_refuses_new_ones(runner, server):
    """The last test: a drain has no way back."""

    async def scenario():
        running = asyncio.create_task(server.run_to_end("running", max_tokens=300))
        while not (await server.cache()).requests_running:
            pass
        first = await server.admin.Drain(pb.DrainRequest())
        with pytest.raises(DrainingError):
            await server.run_to_end("late")
        refused = await server.http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 1})
        info = await server.admin.GetServerInfo(pb.GetServerInfoRequest())
        last = await server.admin.Drain(pb.DrainRequest(wait_seconds=300))
        return first.requests_left, refused, info.draining, last.requests_left, await running

    first, refused, draining, last, end = runner.run(scenario())
    assert (first, draining, last, end) == (1, True, 0, (300, "length"))
    assert refused.status_code == 503
    assert "draining" in refused.text
