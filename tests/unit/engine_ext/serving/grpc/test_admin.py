"""AdminService on a fake engine: who may call it, and its responses."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vllm.exceptions import RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from starling.config.star import StarOptions
from starling.engine_ext.serving.cli.serve_args import admin_options
from starling.engine_ext.serving.grpc import admin
from starling.engine_ext.serving.grpc.admin import (
    AdminServicer,
    matching_request_ids,
    refusal,
    star_message,
    start_admin_server,
)
from starling.engine_ext.serving.grpc.messages import DrainingError
from starling.v1 import admin_pb2 as pb
from starling.v1 import admin_pb2_grpc
from starling.v1 import inference_pb2 as inference
from tests.unit.engine_ext.configs import fake_config

BEARER = (("authorization", "Bearer right"),)


@pytest.mark.parametrize(
    ("key", "own_port", "metadata", "code"),
    [
        (None, True, (), None),
        (None, False, (), grpc.StatusCode.PERMISSION_DENIED),
        (None, False, BEARER, grpc.StatusCode.PERMISSION_DENIED),
        (None, False, None, grpc.StatusCode.PERMISSION_DENIED),
        ("right", False, BEARER, None),
        ("right", True, BEARER, None),
        ("right", False, (("authorization", "bearer right"),), None),
        ("right", True, (), grpc.StatusCode.UNAUTHENTICATED),
        ("right", False, (), grpc.StatusCode.UNAUTHENTICATED),
        ("right", False, (("authorization", "Bearer wrong"),), grpc.StatusCode.UNAUTHENTICATED),
        ("right", False, (("authorization", "Basic right"),), grpc.StatusCode.UNAUTHENTICATED),
        ("right", False, (("authorization", "right"),), grpc.StatusCode.UNAUTHENTICATED),
        ("right", False, (("authorization", "Bearer"),), grpc.StatusCode.UNAUTHENTICATED),
        ("schlüssel", False, (("authorization", "Bearer schlüssel"),), None),
        ("right", False, (*BEARER, ("authorization", "Bearer other")), grpc.StatusCode.UNAUTHENTICATED),
        (None, True, (*BEARER, *BEARER), grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_who_may_call(key, own_port, metadata, code):
    refused = refusal(metadata, key, own_port)
    assert (refused and refused[0]) == code
    if refused:
        assert "right" not in refused[1]
    if code is grpc.StatusCode.PERMISSION_DENIED:
        assert "--grpc-admin-port" in refused[1]
        assert "--grpc-admin-key" in refused[1]


@pytest.mark.parametrize(
    ("request_id", "of_front", "of_engine"),
    [
        ("mine", ["grpc-mine"], []),
        ("grpc-mine", ["grpc-mine"], []),
        ("cmpl-7", ["cmpl-7-0", "cmpl-7-1"], []),
        ("cmpl-7-1", ["cmpl-7-1"], []),
        ("chatcmpl-7", ["chatcmpl-7"], []),
        ("0_grpc-mine-abc", [], ["0_grpc-mine-abc"]),
        ("min", [], []),
        ("mine-0", ["grpc-mine-0"], []),
        (".*", [], []),
    ],
)
def test_matching_request_ids(request_id, of_front, of_engine):
    front = ["grpc-mine", "grpc-mine-0", "cmpl-7-0", "cmpl-7-1", "cmpl-70-0", "chatcmpl-7"]
    found = matching_request_ids(request_id, front, ["0_grpc-mine-abc", "cmpl-7-0-def"])
    assert found == (of_front, of_engine)


def test_star_defaults_as_a_message():
    message = star_message(StarOptions(mode="auto", block_size="n/4"))
    assert message == inference.StarOptions(
        mode=inference.StarOptions.MODE_AUTO,
        min_tokens=32768,
        block_size="n/4",
        replicas=0,
        shards=False,
        adapter=True,
    )
    assert star_message(StarOptions(shards="on")).shards
    assert star_message(StarOptions(block_size=64)).block_size == "64"
    assert star_message(StarOptions(replicas=3)).replicas == 3
    assert star_message(StarOptions(segments="auto")).segments == "auto"


class InputProcessor:
    """As far as a front's state looks at it."""

    def __init__(self, vllm_config) -> None:
        self.vllm_config = vllm_config


class FakeEngine:
    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.asked = 0
        self.errored = False
        self.dead_error = EngineDeadError()
        self.aborted: list[str] = []
        self.engine_core = SimpleNamespace(_call_utility_async=self.call, core_engines=["one"])
        states = {
            "grpc-a-11": SimpleNamespace(external_req_id="grpc-a", is_prefilling=False, num_cached_tokens=32),
        }
        self.output_processor = SimpleNamespace(external_req_ids={"grpc-a": ["grpc-a-11"]}, request_states=states)
        self.vllm_config = fake_config()
        self.vllm_config.additional_config = {"starling": {}}
        scheduling = self.vllm_config.scheduler_config
        scheduling.max_num_seqs, scheduling.max_num_batched_tokens = 4, 512
        scheduling.max_num_queued_reqs, scheduling.max_num_queued_tokens = 9, None
        self.vllm_config.model_config.served_model_name = "tiny"
        self.vllm_config.model_config.max_model_len = 1000
        self.input_processor = InputProcessor(self.vllm_config)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        pass

    def get_num_unfinished_requests(self) -> int:
        return len(self.output_processor.request_states)

    async def abort(self, request_ids, internal=False) -> None:
        self.aborted += request_ids

    async def reset_prefix_cache(self) -> bool:
        if self.fails:
            raise self.fails
        return False

    async def call(self, name: str, *args, engine: str):
        if engine == "hangs":
            self.asked += 1
            await asyncio.Event().wait()
        if self.fails:
            raise self.fails
        if name == "starling_attention_backends":
            return ["CPU_ATTN"]
        pages = {"pages_total": 39, "pages_used": 4, "pages_cached": 5, "pages_free": 30}
        requests = [{"engine_request_id": "grpc-a-11", "status": "running", "groups": [{"pages": 4, "states": 100}]}]
        return pages | ({"requests": requests} if args == (True,) else {})


class FakeFront:
    draining = False

    async def stop_admitting(self) -> None:
        self.draining = True


@asynccontextmanager
async def admin_of(engine, *, key=None):
    servicer = AdminServicer(engine, FakeFront(), max_message_bytes=1000)
    server, port = await start_admin_server(servicer, key, "127.0.0.1:0", None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield admin_pb2_grpc.AdminServiceStub(channel)
        finally:
            await server.stop(None)


def call(engine, method: str, request, *, metadata=(), **server):
    """The response to one call, or its error."""

    async def scenario():
        async with admin_of(engine, **server) as admin:
            try:
                return await getattr(admin, method)(request, metadata=metadata, timeout=300)
            except grpc.aio.AioRpcError as error:
                return error

    return asyncio.run(scenario())


REQUESTS = {
    "GetServerInfo": pb.GetServerInfoRequest(),
    "GetCacheState": pb.GetCacheStateRequest(),
    "Abort": pb.AbortRequest(request_ids=["a"]),
    "ResetPrefixCache": pb.ResetPrefixCacheRequest(),
    "Drain": pb.DrainRequest(),
}


def test_every_call_is_known_here():
    assert set(REQUESTS) == {method.name for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods}


@pytest.mark.parametrize("method", REQUESTS)
def test_every_call_is_guarded(method):
    engine = FakeEngine()
    refused = call(engine, method, REQUESTS[method], key="right")
    assert refused.code() == grpc.StatusCode.UNAUTHENTICATED
    assert engine.aborted == []
    assert "check_admission" not in vars(engine)
    answer = call(engine, method, REQUESTS[method], key="right", metadata=BEARER)
    assert type(answer).__name__ == f"{method}Response"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineDeadError(), grpc.StatusCode.UNAVAILABLE),
        (Exception("Server shutting down"), grpc.StatusCode.UNAVAILABLE),
        (RetryableRequestError(), grpc.StatusCode.UNAVAILABLE),
        (Exception("Call to starling_cache_state method failed: a bug"), grpc.StatusCode.INTERNAL),
    ],
    ids=["dead", "shutting down", "retryable", "bug"],
)
def test_errors_of_the_engine(error, code):
    assert call(FakeEngine(error), "GetCacheState", REQUESTS["GetCacheState"]).code() == code


def test_an_engine_that_dies_during_a_call(monkeypatch):
    """vLLM never answers such a call."""
    monkeypatch.setattr("starling.vllm_compat.front.DEATH_CHECK_SECONDS", 0.01)
    engine = failing = FakeEngine()

    async def never(*_, engine):
        failing.errored = True
        await asyncio.Event().wait()

    engine.engine_core._call_utility_async = never
    assert call(engine, "GetCacheState", REQUESTS["GetCacheState"]).code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Abort", pb.AbortRequest(), "request_ids"),
        ("Abort", pb.AbortRequest(request_ids=["a", ""]), "request_ids"),
        ("Drain", pb.DrainRequest(wait_seconds=-1), "wait_seconds"),
        ("Drain", pb.DrainRequest(wait_seconds=float("nan")), "wait_seconds"),
        ("Drain", pb.DrainRequest(wait_seconds=float("inf")), "wait_seconds"),
    ],
)
def test_bad_input_is_named(method, request_, field):
    engine = FakeEngine()
    refused = call(engine, method, request_)
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(refused).details[0].Unpack(details)
    assert [violation.field for violation in details.field_violations] == [field]
    assert (engine.aborted, "check_admission" in vars(engine)) == ([], False)


def test_cache_state_with_the_state_of_the_front():
    (plain,) = call(FakeEngine(), "GetCacheState", pb.GetCacheStateRequest()).engines
    assert (plain.pages_total, plain.pages_used, plain.pages_cached, plain.pages_free) == (39, 4, 5, 30)
    assert not plain.requests
    (full,) = call(FakeEngine(), "GetCacheState", pb.GetCacheStateRequest(per_request=True)).engines
    (request,) = full.requests
    assert (request.request_id, request.engine_request_id, request.cached_tokens) == ("grpc-a", "grpc-a-11", 32)
    assert request.groups[0] == pb.GroupUsage(pages=4, states=100)


def test_a_replica_that_hangs_is_named_and_the_others_state_does_not_wait_for_it(monkeypatch):
    """It is asked once, however often its state is asked for."""
    monkeypatch.setattr(admin, "ANSWER_SECONDS", 0.05)
    engine = FakeEngine()
    engine.engine_core.core_engines = ["one", "hangs", "another"]

    async def scenario():
        async with admin_of(engine) as stub:
            answers = [await stub.GetCacheState(pb.GetCacheStateRequest(), timeout=300) for _ in range(3)]
            return answers, await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=300)

    answers, info = asyncio.run(scenario())
    for answer in answers:
        assert list(answer.unanswered) == [1]
        assert [state.pages_total for state in answer.engines] == [39, 39]
    assert list(info.attention_backends) == ["CPU_ATTN"]
    assert engine.asked == 2, "once for each question"


def test_abort_says_which_were_found():
    engine = FakeEngine()
    answer = call(engine, "Abort", pb.AbortRequest(request_ids=["a", "b", "a", "grpc-a-11"]))
    assert (answer.found, answer.unknown) == (["a", "grpc-a-11"], ["b"])
    assert engine.aborted == ["grpc-a", "grpc-a-11"]


def test_server_info():
    info = call(FakeEngine(), "GetServerInfo", pb.GetServerInfoRequest())
    assert (info.models, info.attention_backends, info.draining) == (["tiny"], ["CPU_ATTN"], False)
    assert info.star_defaults.mode == inference.StarOptions.MODE_OFF
    assert info.limits == pb.Limits(
        max_model_tokens=1000,
        max_running_requests=4,
        max_step_tokens=512,
        max_queued_requests=9,
        max_message_bytes=1000,
    )
    assert not info.refused_features
    assert info.uptime_seconds >= 0
    assert info.starling_version and info.vllm_version and info.torch_version


def test_drain_is_idempotent_and_waits():
    async def scenario():
        engine = FakeEngine()
        async with admin_of(engine) as admin:
            answers = [await admin.Drain(pb.DrainRequest()) for _ in range(2)]
            assert (await admin.GetServerInfo(pb.GetServerInfoRequest())).draining
            with pytest.raises(DrainingError, match="draining"):
                engine.check_admission(1)
            waiting = asyncio.ensure_future(admin.Drain(pb.DrainRequest(wait_seconds=300)))
            engine.output_processor.request_states.clear()
            return [*answers, await waiting]

    answers = asyncio.run(scenario())
    assert [answer.requests_left for answer in answers] == [1, 1, 0]


def test_refusals_after_a_drain_keep_nothing_of_earlier_requests():
    """An exception that is raised again would keep the tracebacks, and so the frames, of all earlier requests."""

    async def scenario():
        engine = FakeEngine()
        async with admin_of(engine) as admin:
            await admin.Drain(pb.DrainRequest())
            for _ in range(1000):
                with pytest.raises(DrainingError) as refused:
                    engine.check_admission(1)
            return len(refused.traceback)

    assert asyncio.run(scenario()) == 2


def namespace(**given) -> Namespace:
    return Namespace(port=8000, model="m", **{f"grpc_admin_{name}": value for name, value in given.items()})


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({}, {}, (None, "127.0.0.1", None)),
        ({"port": 7}, {}, (7, "127.0.0.1", None)),
        ({"key": "k"}, {"STARLING_ADMIN_KEY": "e"}, (None, "127.0.0.1", "k")),
        ({}, {"STARLING_ADMIN_KEY": "e"}, (None, "127.0.0.1", "e")),
        ({"port": 0, "host": "0.0.0.0", "key": "k"}, {}, (0, "0.0.0.0", "k")),
        ({"port": 0, "host": "::1"}, {}, (0, "::1", None)),
    ],
)
def test_admin_options(given, environ, expected):
    args = namespace(**given)
    options = admin_options(args, 50051, environ)
    assert (options.port, options.host, options.key) == expected
    assert vars(args) == {"port": 8000, "model": "m"}, "vLLM logs its arguments"


@pytest.mark.parametrize(
    ("given", "grpc_port", "says"),
    [
        ({"port": 7}, None, "without --grpc-port"),
        ({"key": "secret"}, None, "without --grpc-port"),
        ({"port": 8000}, 50051, "has that port"),
        ({"port": 50051}, 50051, "has that port"),
        ({"port": 70000}, 50051, "0 to 65535"),
        ({"host": "::1"}, 50051, "has no effect"),
        ({"key": ""}, 50051, "the key is empty"),
        ({"port": 7, "host": "0.0.0.0"}, 50051, "can connect to 0.0.0.0"),
    ],
)
def test_admin_options_are_refused(given, grpc_port, says):
    with pytest.raises(ValueError, match=says) as refused:
        admin_options(namespace(**given), grpc_port, {})
    assert "secret" not in str(refused.value)
