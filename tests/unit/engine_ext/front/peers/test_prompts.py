"""Prompts that are split over servers that are peers, also those that end early.

The simulation's fingerprints check every KV page that is read: a wrong page, or one that is no longer held, fails the
step that reads it.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace

import pytest
from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.serving.grpc.admin import AdminServicer
from starling.features.replicas.split import engine_replica
from starling.scheduler.star.facts import PromptFacts
from starling.scheduler.star.request_metadata import metadata_of
from starling.v1 import admin_pb2
from starling.v1 import replica_pb2 as pb
from tests.unit.engine_ext.front.peers.pods import AUTO, held_by, until
from tests.unit.engine_ext.front.simulation import PAGE_SIZE, TOKENS, whole_requests
from tests.unit.scheduler.simulation import random_ids


def test_a_peer_prefills_a_part_and_the_pages_are_fetched(run_pods):
    async def scenario(a, b):
        outputs = await a.server.generate(TOKENS, AUTO, priority=7, cache_salt="salt")
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert a.server.work() == [[(0, 320), (480, 522)]]
        assert b.server.work() == [[(0, 64), (320, 480)]]
        (whole,) = whole_requests(a.server)
        assert [source.start for source in metadata_of(whole).fetch.sources] == [320]
        assert a.replica.fetched == [160 // PAGE_SIZE]
        requests = [*a.replica.requests.values(), *b.replica.requests.values()]
        assert {(request.priority, request.cache_salt) for request in requests} == {(7, "salt")}

    run_pods(scenario)


def test_three_servers_share_a_prompt_and_each_may_be_asked(run_pods):
    async def scenario(*pods):
        for seed, pod in enumerate(pods):
            before = [len(other.replica.work) for other in pods]
            await pod.server.generate(random_ids(seed, 900), AUTO)
            assert [len(other.replica.work) - count for other, count in zip(pods, before, strict=True)] == [2, 2, 2]

    run_pods(scenario, 3)


def test_what_a_peer_has_cached_is_not_computed_again(run_pods):
    async def scenario(a, b):
        await b.server.generate(TOKENS, AUTO | {"star_replicas": 1})
        before = len(b.replica.work)
        await a.server.generate(TOKENS, AUTO)
        (whole,) = whole_requests(a.server)
        assert (
            sum(stop - start for start, stop in list(b.replica.work.values())[before:]) <= PAGE_SIZE
        )  # a part's last page, for its one output
        assert metadata_of(whole).fetch is not None

    run_pods(scenario)


def test_the_plan_names_the_servers_there_are_now(run_pods):
    async def scenario(a, b):
        planner = front_state(a.server.engine).planner
        assert planner.plan(AUTO, PromptFacts(900, random_ids(0, 900))).plan.replicas == 2
        a.state.peers.by_address[b.address].problem = "gone"
        assert planner.plan(AUTO, PromptFacts(900, random_ids(0, 900))).plan.replicas == 1
        assert planner.plan(AUTO | {"star_replicas": 5}, PromptFacts(900, random_ids(0, 900))).plan.replicas == 1

    run_pods(scenario)


def test_a_prompt_is_made_a_message_once_for_all_peers(run_pods, monkeypatch):
    made = []

    def make(**fields):
        made.append(fields)
        return pb.PrefillPartRequest(**fields)

    async def scenario(a, b, c):
        await a.server.generate(TOKENS, AUTO)
        assert len(made) == 1
        assert b.replica.work
        assert c.replica.work

    monkeypatch.setattr(engine_replica, "pb", Namespace(PrefillPartRequest=make))
    run_pods(scenario, 3)


def test_any_priority_is_sent(run_pods):
    async def scenario(a, b):
        for priority in (2**40, -(2**40)):
            await a.server.generate(random_ids(priority % 1000, 520), AUTO, priority=priority)
            assert {request.priority for request in b.replica.requests.values()} == {priority}
            b.replica.requests.clear()

    run_pods(scenario)


@pytest.mark.parametrize("token", [10**6, 2**32])
def test_a_prompt_with_an_unknown_token_is_refused_as_without_peers(run_pods, token):
    async def scenario(a, b):
        for star in (AUTO, AUTO | {"star_replicas": 1}):
            with pytest.raises(VLLMValidationError, match="vocabulary"):
                await a.server.generate([*TOKENS, token], star)
        assert a.state.peers.usable

    run_pods(scenario)


@pytest.mark.parametrize("asked", [(0, 0, 0, 0), (0, 1, 0, 1)], ids=["one server", "both servers"])
def test_prompts_that_do_not_fit_at_once_do_not_wait_for_one_another(run_pods, asked):
    """Each takes half of a server's memory, and holds its own part while the others' parts run."""

    async def scenario(*pods):
        runs = (pods[at].server.generate(random_ids(n, 1500), AUTO, name=f"{n}") for n, at in enumerate(asked))
        for outputs in await asyncio.gather(*runs):
            assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        for pod in pods:
            assert not any(pod.state.reservations.reserved.values())

    run_pods(scenario)


def test_a_peer_without_memory_for_a_part_refuses_it(run_pods):
    async def scenario(a, b):
        reserved = b.state.reservations.reserve_at_once({0: 95}, {0: 99})
        await a.server.generate(TOKENS, AUTO)
        assert b.server.work() == [[]]
        assert max(stop for _, stop in a.replica.work.values()) == 522
        assert b.state.reservations.reserved[0] == 95
        reserved.release(0)

    run_pods(scenario)


# Requests that end early.


@pytest.mark.parametrize("moment", ["the parts run", "one part is held"])
def test_a_client_that_leaves_takes_the_parts_with_it(run_pods, moment):
    async def scenario(a, b):
        held = moment == "one part is held"
        running = asyncio.create_task(a.server.generate(TOKENS if held else random_ids(1, 4000), AUTO))
        await until(lambda: a.replica.work)
        if held:
            a.replica.running.clear()  # its own part does not end
            await held_by(b)
        else:
            await until(lambda: b.replica.work)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        a.replica.running.set()
        await until(lambda: not b.replica.held and not b.replica.scheduler.requests)

    run_pods(scenario)


def test_a_request_that_an_operator_aborts_on_either_server_ends(run_pods):
    async def scenario(a, b):
        for pod in (a, b):
            running = asyncio.create_task(a.server.generate(random_ids(3, 4000), AUTO))
            await until(lambda: a.state.internal_ids and b.state.internal_ids)
            await pod.server.engine.abort("me")
            (output,) = await running
            assert [choice.finish_reason for choice in output.outputs] == ["abort"]

    run_pods(scenario)


@pytest.mark.parametrize("num_requests", [1, 2], ids=["its anchor is complete", "it has begun"])
def test_an_operator_aborts_another_servers_part_by_the_engines_id(run_pods, num_requests):
    async def scenario(a, b):
        run_step, aborts = b.replica.run_step, []

        async def abort() -> None:
            (part,) = b.state.internal_ids
            response = await AdminServicer(b.server.engine, b.front, max_message_bytes=1).Abort(
                admin_pb2.AbortRequest(request_ids=[part]), None
            )
            assert response.found == [part]

        def abort_behind_a_first_step():
            outputs = run_step()
            if len(b.replica.work) == num_requests and not aborts:  # the anchor's, which has one step, and the part's
                aborts.append(asyncio.ensure_future(abort()))  # before the step's outputs reach the front
            return outputs

        b.replica.run_step = abort_behind_a_first_step
        (output,) = await a.server.generate(random_ids(3, 4000), AUTO)
        await aborts[0]
        assert output.outputs[0].finish_reason == "abort"
        assert len(a.state.peers.usable) == 1

    run_pods(scenario)


def test_draining_waits_for_the_parts_of_other_servers(run_pods):
    async def scenario(a, b):
        running = asyncio.create_task(a.server.generate(random_ids(3, 2000), AUTO))
        await until(lambda: b.state.internal_ids)
        assert b.server.engine.get_num_unfinished_requests() == 1
        await b.front.stop_admitting()
        stopping = asyncio.create_task(b.front.stop(300))
        await asyncio.sleep(0)
        await running
        assert len(b.replica.work) == 2
        await stopping
        # From now on this server computes alone.
        await a.state.peers.refresh()
        assert a.state.peers.usable == []
        await a.server.generate(random_ids(4, 600), AUTO)
        assert len(b.replica.work) == 2

    run_pods(scenario)
