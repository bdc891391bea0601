"""Split prompts and the limits of admission, Drain, Abort and shutdown: from its admission on, a prompt counts once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.serving.grpc.admin import AdminServicer
from starling.engine_ext.serving.grpc.messages import DrainingError
from starling.features.replicas.replica_calls import OPEN_SHARD
from starling.v1 import admin_pb2 as pb
from tests.unit.engine_ext.front.simulation import SHARDS, STAR, TOKENS, both_parts_run, whole_requests
from tests.unit.engine_ext.front.virtual_time import now, until
from tests.unit.scheduler.simulation import random_ids


class FakeFront:
    draining = False

    async def stop_admitting(self) -> None:
        self.draining = True


CONTEXT = SimpleNamespace(invocation_metadata=tuple)


def admin_of(server) -> AdminServicer:
    return AdminServicer(server.engine, FakeFront(), max_message_bytes=1000)


async def waiting_for_room(server) -> tuple[asyncio.Task, asyncio.Task]:
    """Two prompts that each need more than half of a replica's memory: the second one waits."""
    running = asyncio.create_task(server.generate(random_ids(1, 520), SHARDS, "runs", max_tokens=30))
    await until(lambda: server.calls(OPEN_SHARD))
    waiting = asyncio.create_task(server.generate(random_ids(2, 520), SHARDS, "waits"))
    await until(lambda: front_state(server.engine).replicas.state.reservations.turn.locked())
    await asyncio.sleep(0.2)
    assert server.engine.output_processor.external_req_ids.keys() == {"runs"}
    return running, waiting


# Limits.


@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
def test_prompts_beyond_the_limit_are_refused_at_once_and_admitted_ones_never(
    simulate, server_config, monkeypatch, star
):
    monkeypatch.setattr(server_config.scheduler_config, "max_num_queued_reqs", 5)

    async def scenario(server):
        requests = [server.generate(random_ids(number, 520), star, f"r{number}") for number in range(12)]
        running = [asyncio.create_task(request) for request in requests]
        await asyncio.sleep(0)
        refused = [task for task in running if task.done()]
        assert len(refused) == 7
        assert all(isinstance(task.exception(), QueueOverflowError) for task in refused)
        await both_parts_run(server)
        assert server.engine.get_num_unfinished_requests() == 5
        with pytest.raises(QueueOverflowError):
            await server.generate(random_ids(99, 30))
        admitted = [task for task in running if task not in refused]
        assert [outputs[-1].finished for outputs in await asyncio.gather(*admitted)] == [True] * 5
        assert server.engine.get_num_unfinished_requests() == 0

    simulate(scenario)


def test_a_prompt_with_several_choices_counts_as_several_requests(simulate, server_config, monkeypatch):
    monkeypatch.setattr(server_config.scheduler_config, "max_num_queued_reqs", 3)

    async def scenario(server):
        counts = set()
        running = asyncio.create_task(server.generate(TOKENS, STAR, n=2, temperature=1.0, max_tokens=4))
        await both_parts_run(server)
        while not (whole_requests(server) and whole_requests(server)[0].num_output_tokens):
            counts.add(server.engine.get_num_unfinished_requests())
            await asyncio.sleep(0.01)
        assert counts == {2}
        await running
        with pytest.raises(QueueOverflowError):
            await server.generate(TOKENS, STAR, n=4, temperature=1.0)

    simulate(scenario)


def test_the_tokens_of_a_split_prompt_are_queued_once(simulate, server_config, monkeypatch):
    monkeypatch.setattr(server_config.scheduler_config, "max_num_queued_tokens", 521)

    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, STAR))
        await both_parts_run(server)
        assert server.engine.get_num_queued_tokens() == 520
        second = asyncio.create_task(server.generate(random_ids(2, 520), STAR))
        await asyncio.sleep(0)
        assert server.engine.get_num_queued_tokens() == 1040
        with pytest.raises(MaxQueuedTokensError):
            await server.generate(random_ids(3, 520), STAR)
        await asyncio.gather(running, second)

    simulate(scenario)


# Drain and shutdown.


@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
def test_drain_counts_split_prompts_and_they_end_as_they_would(simulate, star):
    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, star))
        await both_parts_run(server)
        admin = admin_of(server)
        assert (await admin.Drain(pb.DrainRequest(), CONTEXT)).requests_left == 1
        with pytest.raises(DrainingError):
            await server.generate(random_ids(3, 520), star, "late")
        assert (await admin.Drain(pb.DrainRequest(wait_seconds=600), CONTEXT)).requests_left == 0
        assert (await running)[-1].outputs[0].finish_reason == "length"

    simulate(scenario)


def test_drain_waits_for_a_prompt_that_waits_for_memory(simulate):
    async def scenario(server):
        running, waiting = await waiting_for_room(server)
        admin = admin_of(server)
        assert (await admin.Drain(pb.DrainRequest(), CONTEXT)).requests_left == 2
        assert (await admin.Drain(pb.DrainRequest(wait_seconds=600), CONTEXT)).requests_left == 0
        assert [(await task)[-1].outputs[0].finish_reason for task in (running, waiting)] == ["length"] * 2

    simulate(scenario, num_pages=21)


@pytest.mark.parametrize("timeout", [0, 60])
def test_a_server_that_drains_at_its_end_stops_the_engine_after_its_split_prompts(
    simulate, server_config, monkeypatch, timeout
):
    """vLLM stops the engine in a thread. Without --shutdown-timeout nothing is waited for."""
    monkeypatch.setattr(server_config, "shutdown_timeout", timeout)

    async def scenario(server):
        left = []
        monkeypatch.setattr(server.client, "shutdown", lambda timeout: left.append(len(state.split_requests)))
        state = front_state(server.engine).replicas.state
        running = asyncio.create_task(server.generate(TOKENS, SHARDS))
        await both_parts_run(server)
        stopping = asyncio.create_task(asyncio.to_thread(server.engine.shutdown, timeout))
        if timeout:
            await until(lambda: "check_admission" in vars(server.engine))
            with pytest.raises(RetryableRequestError):
                await server.generate(random_ids(1, 520), SHARDS, "late")
            assert (await running)[-1].outputs[0].finish_reason == "length"
        else:
            with pytest.raises(EngineDeadError):
                await running
        await stopping
        assert left == [0 if timeout else 1]

    simulate(scenario)


# Abort.


def test_a_prompt_that_waits_for_memory_is_aborted_by_its_id(simulate):
    async def scenario(server):
        running, waiting = await waiting_for_room(server)
        aborted = await admin_of(server).Abort(pb.AbortRequest(request_ids=["waits", "unknown"]), CONTEXT)
        assert (aborted.found, aborted.unknown) == (["waits"], ["unknown"])
        started = now()
        (output,) = await waiting
        assert now() - started < 0.1
        assert [choice.finish_reason for choice in output.outputs] == ["abort"]
        assert output.finished
        assert output.prompt_token_ids == random_ids(2, 520)
        assert not running.done()
        assert (await running)[-1].outputs[0].finish_reason == "length"

    simulate(scenario, num_pages=21)


def test_a_prompt_is_aborted_between_its_parts_and_the_whole_request(simulate):
    """The engine knows no request of that id then."""

    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, SHARDS, n=2, temperature=1.0))
        await until(lambda: server.calls(OPEN_SHARD))
        assert not server.engine.output_processor.request_states
        aborted = await admin_of(server).Abort(pb.AbortRequest(request_ids=["me"]), CONTEXT)
        assert aborted.found == ["me"]
        (output,) = await running
        assert [choice.finish_reason for choice in output.outputs] == ["abort", "abort"]
        assert not whole_requests(server)

    simulate(scenario)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("draining", [False, True])
def test_a_prompt_is_aborted_while_it_is_handed_to_the_engine(simulate, monkeypatch, choices, draining):
    """An API server asks its engine once for its tasks before it hands over its first request."""

    async def scenario(server):
        await server.generate(TOKENS, STAR | {"star_replicas": 1})  # from now on one replica has all of it cached
        requests = whole_requests(server)
        asked, answer = asyncio.Event(), asyncio.Event()

        async def get_supported_tasks():
            asked.set()
            await answer.wait()
            return ("generate",)

        monkeypatch.setattr(server.engine, "get_supported_tasks", get_supported_tasks)
        running = asyncio.create_task(server.generate(TOKENS, STAR, n=choices, temperature=1.0))
        await asked.wait()
        if draining:
            await admin_of(server).Drain(pb.DrainRequest(), CONTEXT)
        aborted = await admin_of(server).Abort(pb.AbortRequest(request_ids=["me"]), CONTEXT)
        assert aborted.found == ["me"]
        answer.set()
        (output,) = await running
        assert [choice.finish_reason for choice in output.outputs] == ["abort"] * choices
        assert whole_requests(server) == requests

    simulate(scenario)


@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
def test_choices_that_are_handed_to_the_engine_after_an_abort_end_before_their_pages_are_released(simulate, star):
    """vLLM's abort misses a choice of n > 1 that the engine core does not have yet."""

    async def scenario(server):
        add_request, handing_over, go_on = server.client.add_request_async, asyncio.Event(), asyncio.Event()

        async def add_second_choice_later(request):
            if request.request_id.startswith("1_"):
                handing_over.set()
                await go_on.wait()
            await add_request(request)

        server.client.add_request_async = add_second_choice_later
        running = asyncio.create_task(server.generate(TOKENS, star, n=2, temperature=1.0, max_tokens=30))
        await handing_over.wait()
        await server.engine.abort("me")
        await until(lambda: not server.replicas[0].scheduler.requests)
        go_on.set()
        (output,) = await running
        assert [choice.finish_reason for choice in output.outputs] == ["abort"] * 2
        assert not server.replicas[0].scheduler.requests

    simulate(scenario)


def test_of_two_prompts_with_one_id_the_end_of_the_first_leaves_the_second_known(simulate):
    async def scenario(server):
        short = asyncio.create_task(server.generate(random_ids(1, 520), STAR))
        long = asyncio.create_task(server.generate(random_ids(2, 520), STAR, max_tokens=50))
        await short
        assert list(front_state(server.engine).replicas.state.split_requests) == ["me"]
        await server.engine.abort("me")
        assert (await long)[-1].outputs[0].finish_reason == "abort"

    simulate(scenario)
