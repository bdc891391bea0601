"""The snapshots of the live page, over simulated replicas."""

from __future__ import annotations

import asyncio
import json

import pytest
from prometheus_client import CollectorRegistry, Counter
from vllm.v1.engine.exceptions import EngineDeadError

from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.live import KEEP_SECONDS, SHARE_SECONDS, WAIT_SECONDS, LiveView, read_totals
from starling.features.live.core import LISTED, MAX_ID
from starling.scheduler.cache_state import LIVE_REQUESTS
from tests.unit.engine_ext.conftest import REPLICAS
from tests.unit.engine_ext.front.simulation import Server
from tests.unit.engine_ext.front.virtual_time import now
from tests.unit.scheduler.simulation import random_ids

PROMPT = random_ids(0, 2500)
SPLIT = {"star": "on", "star_block_size": 256, "star_query_tokens": 40, "star_replicas": REPLICAS}


@pytest.fixture(autouse=True)
def no_totals(monkeypatch):
    """They are read in a thread, during which virtual time would run on."""

    async def totals(self) -> dict:
        return {}

    monkeypatch.setattr(LiveView, "_totals", totals)


async def read_to_end(outputs) -> None:
    async for _ in outputs:
        pass


async def look(view: LiveView) -> dict:
    """A snapshot that is newer than the last one."""
    await asyncio.sleep(SHARE_SECONDS)
    return json.loads(await view.body())


def test_a_split_prompt_is_one_request_in_all_of_its_phases(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        await look(view)
        running = asyncio.create_task(read_to_end(server.stream(PROMPT, SPLIT, "mine", max_tokens=40)))
        rows = []
        while not running.done():
            live = json.loads(await view.body())
            assert len(live["requests"]) <= 1
            rows += live["requests"]
            view.snapshot = None
            await asyncio.sleep(0.01)
        assert {row["id"] for row in rows} == {"mine"}
        assert {(row["prompt"], row["star_blocks"], row["replicas"]) for row in rows} == {(2500, 10, REPLICAS)}
        parts = [row for row in rows if row["part"]]
        wholes = [row for row in rows if not row["part"]]
        assert any(row["on"] == [0, 1, 2] and row["computed"] > 100 for row in parts)
        for name in ("computed", "star_blocks_done"):
            numbers = [row[name] for row in rows]
            assert numbers == sorted(numbers)
            assert len(set(numbers)) > 2
        assert {row["cached"] for row in rows} == {0}, "what other replicas have computed is no hit"
        assert wholes[-1]["on"] == [0]
        assert wholes[-1]["generated"] > 0
        (row,) = (await look(view))["ended"]
        assert (row["id"], row["finish_reason"], row["generated"]) == ("mine", "length", 40)

    simulate(scenario)


def test_a_split_prompt_with_the_id_of_one_before_begins_anew(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        for seed in range(2):
            outputs = server.stream(random_ids(seed, 2500), SPLIT, "mine", max_tokens=40)
            running = asyncio.create_task(read_to_end(outputs))
            computed = []
            while not running.done():
                computed += [row["computed"] for row in json.loads(await view.body())["requests"]]
                view.snapshot = None
                await asyncio.sleep(0.01)
            assert computed[0] < 500
            assert computed[-1] == 2500

    simulate(scenario)


def test_requests_of_all_replicas_are_listed_running_ones_first(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        tasks = [
            asyncio.create_task(read_to_end(server.stream(PROMPT, None, f"{rank}-{number}", data_parallel_rank=rank)))
            for rank in range(REPLICAS)
            for number in range(3)
        ]
        live = await look(view)
        assert [row["status"] for row in live["requests"]] == ["running"] * 3 + ["waiting"] * 6
        assert [row["on"] for row in live["requests"][:3]] == [[0], [1], [2]]
        assert [(each["running"], each["waiting"]) for each in live["replicas"]] == [(1, 2)] * 3
        assert live["not_listed"] == live["waiting_in_front"] == 0
        await asyncio.gather(*tasks)

    simulate(scenario)


def test_many_requests_are_counted_and_some_are_listed(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        await look(view)
        number = 60
        tasks = [
            asyncio.create_task(read_to_end(server.stream(PROMPT[:50], None, f"{index}", data_parallel_rank=index % 2)))
            for index in range(2 * number)
        ]
        for replica in server.replicas:
            replica.running.clear()
        await asyncio.sleep(0)
        for replica in server.replicas:
            replica.running.set()
        live = await look(view)
        while not live["requests"]:
            live = await look(view)
        shown = len(live["requests"])
        assert shown <= LISTED
        assert shown + live["not_listed"] == sum(each["running"] + each["waiting"] for each in live["replicas"])
        await asyncio.gather(*tasks)

    simulate(scenario)


def test_viewers_share_a_snapshot_and_nobody_costs_nothing(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        await asyncio.gather(*(view.body() for _ in range(100)))
        assert len(server.calls(LIVE_REQUESTS)) == REPLICAS
        await view.body()
        assert len(server.calls(LIVE_REQUESTS)) == REPLICAS
        await look(view)
        assert len(server.calls(LIVE_REQUESTS)) == 2 * REPLICAS
        await asyncio.sleep(KEEP_SECONDS)
        assert len(server.calls(LIVE_REQUESTS)) == 2 * REPLICAS
        assert (view.answers, view.calls, view.snapshot) == ({}, {}, None)

    simulate(scenario)


def test_a_viewer_that_leaves_while_it_waits_takes_nothing_from_others(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        server.replicas[0].running.clear()
        leaves, stays = (asyncio.create_task(view.body()) for _ in range(2))
        await asyncio.sleep(WAIT_SECONDS / 2)
        leaves.cancel()
        server.replicas[0].running.set()
        assert json.loads(await stays)["replicas"][0]["age"] == 0

    simulate(scenario)


def test_a_replica_that_hangs_is_asked_once_and_shown_with_the_age_of_its_answer(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        server.replicas[2].running.clear()
        before = now()
        ages = [each["age"] for each in json.loads(await view.body())["replicas"]]
        assert (ages[2], now() - before) == (None, WAIT_SECONDS)
        assert all(age <= WAIT_SECONDS for age in ages[:2])
        for _ in range(5):
            live = await look(view)
        assert [each["age"] is None for each in live["replicas"]] == [False, False, True]
        assert [rank for rank, _ in server.calls(LIVE_REQUESTS)].count(2) == 1
        server.replicas[2].running.set()
        await asyncio.sleep(0.1)
        server.replicas[2].running.clear()  # its late answer counts, and the next one is missing
        ages = [(await look(view))["replicas"][2]["age"] for _ in range(2)]
        assert all(age is not None for age in ages)
        assert ages[0] < ages[1]
        server.replicas[2].running.set()
        await asyncio.sleep(1)

    simulate(scenario)


def test_a_dead_engine_is_an_error(simulate):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        await view.body()
        server.client.die()
        await asyncio.sleep(SHARE_SECONDS)
        with pytest.raises(EngineDeadError):
            await view.body()

    simulate(scenario)


def test_hits_of_a_request_that_runs_already_are_the_fronts(simulate):
    async def scenario(server: Server):
        await read_to_end(server.stream(PROMPT, None, "first"))
        outputs = server.stream(PROMPT, None, "again", max_tokens=500)
        await anext(outputs)
        live = await look(LiveView(server.engine))
        assert [(row["id"], row["cached"]) for row in live["requests"]] == [("again", 2496)]
        await server.engine.abort("again")
        await read_to_end(outputs)

    simulate(scenario)


@pytest.mark.parametrize(
    ("engine_id", "shown"),
    [
        ("cmpl-one-0-0123abcd", "cmpl-one-0"),
        ("one", "one"),
        ("x" * (MAX_ID + 5), "x" * (MAX_ID + 5)),
    ],
)
def test_ids_of_other_api_servers_lose_what_vllm_appends(simulate, engine_id, shown):
    async def scenario(server: Server):
        view = LiveView(server.engine)
        assert view._row(0, {"id": engine_id, "seconds": 1.0, "cached": 0, "split": False})["id"] == shown

    simulate(scenario)


def test_a_split_prompt_that_no_replica_has_yet_is_counted(simulate):
    async def scenario(server: Server):
        class Request:
            request_id = "waits"

            def abort(self) -> None: ...

        request = Request()
        front_state(server.engine).replicas.state.split_requests.add(request)
        assert (await look(LiveView(server.engine)))["waiting_in_front"] == 1
        front_state(server.engine).replicas.state.split_requests.remove(request)

    simulate(scenario)


def test_totals_are_sums_over_labels():
    registry = CollectorRegistry()
    assert read_totals(registry) == {}
    computed = Counter("starling:computed_tokens", "", ["replica"], registry=registry)
    computed.labels("0").inc(3)
    computed.labels("1").inc(4)
    Counter("starling:other", "", registry=registry).inc(5)
    assert read_totals(registry) == {"computed_tokens": 7}
