"""Prompts split over simulated replicas: what each replica computes, and which pages it holds.

The simulation's fingerprints check every KV page that is read: a wrong page, or one that is no longer held, fails the
step that reads it. Prompts whose KV stays on its replicas, and the ends of
requests, have files of their own.
"""

from __future__ import annotations

import asyncio
import logging
import random

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from starling.engine_ext.front.front_state import front_state
from starling.features.replicas.replica_calls import REPLICA_STATE
from starling.features.replicas.split import engine_replica, split_prefill
from starling.features.replicas.split.split_state import split_metrics
from starling.scheduler.planning.plan import StarPlan, pad
from starling.scheduler.planning.request_metadata import metadata_of
from tests.unit.engine_ext.front.simulation import (
    PAGE_SIZE,
    SHARDS,
    STAR,
    TOKENS,
    Server,
    whole_requests,
)
from tests.unit.engine_ext.front.virtual_time import until
from tests.unit.scheduler.simulation import random_ids

WHOLE = (480, 522)
"""What the whole request computes: the query, what the context has beyond its last whole page, and two tokens."""


# What is computed, and where.


def test_each_replica_computes_its_part_and_the_first_one_runs_the_request(simulate):
    async def scenario(server):
        before = [split_metrics().split_blocks.labels(str(rank))._value.get() for rank in range(3)]
        outputs = await server.generate(TOKENS, STAR, priority=7, cache_salt="salt", extra_args={"theirs": 1})
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        # 5 blocks, then the whole request | the anchor, then 3 blocks to the last whole page
        assert server.work() == [[(0, 320), WHOLE], [(0, 64), (320, 480)], []]
        requests = [request for replica in server.replicas for request in replica.requests.values()]
        assert {(request.priority, request.cache_salt) for request in requests} == {(7, "salt")}
        (whole,) = whole_requests(server)
        assert whole.sampling_params.extra_args["theirs"] == 1
        metadata = metadata_of(whole)
        assert metadata.plan == StarPlan(64, 64, 0, 500, 520, 2)
        assert [source.start for source in metadata.fetch.sources] == [320]
        after = [split_metrics().split_blocks.labels(str(rank))._value.get() for rank in range(3)]
        assert [b - a for a, b in zip(before, after, strict=True)] == [5, 3, 0]

    simulate(scenario)


@pytest.mark.parametrize("shards", ["off", "on"])
@pytest.mark.parametrize(
    ("length", "query", "replicas"),
    [(513, 1, 2), (520, 20, 3), (646, 5, 3), (560, 70, 3)],
    ids=["whole blocks", "3 replicas", "short last block", "long query"],
)
def test_every_context_token_is_computed_once(simulate, length, query, replicas, shards):
    star = STAR | {"star_query_tokens": query, "star_replicas": replicas, "star_shards": shards}
    simulate(lambda server: check_spans(server, length, query, replicas, star))


def test_with_shards_a_prompt_can_be_larger_than_the_memory_of_a_replica(simulate):
    star = SHARDS | {"star_query_tokens": 100, "star_replicas": 3}
    simulate(lambda server: check_spans(server, 900, 100, 3, star), num_pages=21)


def test_prompts_that_do_not_fit_at_once_do_not_wait_for_one_another(simulate):
    """Each takes half of a replica's memory, and holds its parts until it has fetched all of them."""
    star = {name: value for name, value in STAR.items() if name != "star_replicas"}

    async def scenario(server):
        runs = (server.generate(random_ids(number, 1500), star, name=f"{number}") for number in range(4))
        for outputs in await asyncio.wait_for(asyncio.gather(*runs), 100):
            assert outputs[-1].outputs[0].token_ids == [7, 7, 7]

    simulate(scenario, num_pages=100)


@pytest.mark.parametrize("star", [STAR, SHARDS], ids=["fetched", "shards"])
@pytest.mark.parametrize("choices", [1, 2])
def test_a_request_that_waits_for_the_pages_of_a_split_prompt_is_passed_by_it(simulate, star, choices):
    """The whole request comes behind it in the queue, and holds the pages of its own part."""

    async def scenario(server):
        sampling = {"n": choices, "temperature": 1.0 if choices > 1 else 0.0}
        split = asyncio.create_task(server.generate(random_ids(1, 1900), star, name="split", **sampling))
        await until(lambda: server.replicas[0].work)
        waiting = asyncio.create_task(server.generate(random_ids(2, 2900), name="waits", data_parallel_rank=0))
        for running in (split, waiting):
            outputs = await asyncio.wait_for(running, 200)
            assert outputs[-1].finished

    simulate(scenario)


async def check_spans(server: Server, length: int, query: int, replicas: int, star: dict) -> None:
    """Run a prompt, and check that the replicas' spans follow one another, beside the copies of the anchor."""
    await server.generate(random_ids(length, length), star)
    spans = sorted(span for replica in server.work() for span in replica)
    assert spans.count((0, 64)) == replicas - 1
    spans = [span for span in spans if span != (0, 64)]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1] == ((length - query) // PAGE_SIZE * PAGE_SIZE, length + 2)


def test_parts_and_the_whole_request_have_the_padding_of_documents(simulate):
    documents = [random_ids(size, size) for size in (60, 70, 100, 50, 64, 30)]
    starts = [sum(map(len, documents[:number])) for number in range(len(documents))]
    prompt = [token for document in documents for token in document] + random_ids(1, 20)
    star = STAR | {"star_segments": starts, "star_block_size": 128}

    async def scenario(server):
        await server.generate(prompt, star)
        prompts = [ids for replica in server.replicas for ids in replica.prompts.values()]
        (whole,) = whole_requests(server)
        plan = metadata_of(whole).plan
        padded = pad(plan, prompt)
        assert len(padded) > len(prompt) and len(plan.documents) == len(documents)
        assert all(ids in (prompt, padded[: len(ids)]) for ids in prompts)
        assert [args[0] for _, args in server.calls(REPLICA_STATE)] == [padded] * 3
        assert [len(spans) for spans in server.work()] == [2, 1, 0]

    simulate(scenario)


def test_a_cached_anchor_is_not_computed_again(simulate):
    async def scenario(server):
        await server.generate(TOKENS, STAR)
        before = [len(spans) for spans in server.work()]
        await server.generate(TOKENS[:64] + random_ids(1, 456), STAR)
        work = [spans[count:] for spans, count in zip(server.work(), before, strict=True)]
        assert work == [[(64, 320), WHOLE], [(320, 480)], []]

    simulate(scenario)


def test_a_replica_that_has_the_whole_prompt_cached_gets_the_request_and_there_are_no_parts(simulate):
    async def scenario(server):
        await server.generate(TOKENS, STAR | {"star_replicas": 1}, data_parallel_rank=1)
        assert server.work() == [[], [(0, 522)], []]
        await server.generate(TOKENS, STAR)
        assert server.work() == [[], [(0, 522), (512, 522)], []]
        (_, again) = whole_requests(server, 1)
        assert metadata_of(again).fetch is None
        assert {name for _, _, name, _ in server.client.calls} == {REPLICA_STATE}

    simulate(scenario)


def test_a_busy_replica_gets_no_part(simulate):
    async def scenario(server):
        busy = asyncio.create_task(server.generate(random_ids(9, 2500), name="busy", data_parallel_rank=0))
        await until(lambda: server.replicas[0].work)
        await server.generate(TOKENS, STAR)
        assert [len(spans) for spans in server.work()] == [1, 2, 2]
        await busy

    simulate(scenario)


def test_a_prompt_of_an_adapter_looks_for_pages_of_it(simulate, monkeypatch):
    """Pages that an adapter computed have keys that only its own requests make."""

    async def scenario(server):
        processor = server.engine.input_processor
        monkeypatch.setattr(processor, "_validate_lora", lambda lora_request: None)
        monkeypatch.setattr(engine_replica, "run_internal_request", refuse)
        with pytest.raises(RuntimeError, match="not run"):
            await server.generate(TOKENS, STAR, lora_request=LoRARequest("a", 1, "/adapter"))
        assert [args[-1] for _, args in server.calls(REPLICA_STATE)] == [["a", 1, "/adapter"]] * 3

    async def refuse(*args):
        raise RuntimeError("not run")

    simulate(scenario)


@pytest.mark.parametrize(
    ("star", "interval", "computed"),
    [(STAR, 0.06, [300, 480, 520]), (SHARDS, 0.02, [100, 300, 520])],
    ids=["fetched", "shards"],
)
def test_progress_counts_the_parts_together(simulate, star, interval, computed):
    """First two chunks of one part and one chunk of the other one. Between the parts and the whole no request runs."""

    async def scenario(server):
        running = asyncio.create_task(server.generate(TOKENS, star, max_tokens=20))
        poller = front_state(server.engine).poller
        watched = [progress async for progress in poller.watch(server.engine, "me", interval)]
        await running
        assert [progress.computed for progress in watched] == computed
        assert watched[-1].star_blocks_done == 8

    simulate(scenario)


# Pages that the whole request fetches.


def test_pages_are_released_once_every_choice_has_its_first_token(simulate):
    """Also where the response is not streamed, so that its only output comes at the end."""

    async def scenario(server):
        sampling = {"n": 2, "temperature": 1.0, "max_tokens": 40, "output_kind": RequestOutputKind.FINAL_ONLY}
        running = asyncio.create_task(server.generate(TOKENS, STAR, **sampling))
        await until(server.names_held)
        await until(lambda: not server.names_held())
        states = server.engine.output_processor.request_states.values()
        assert [state.is_prefilling for state in states] == [False, False]
        assert not running.done()
        (output,) = await running
        assert [len(choice.token_ids) for choice in output.outputs] == [40, 40]

    simulate(scenario)


def test_a_request_that_ends_while_its_pages_are_released_leaves_none(simulate, monkeypatch):
    async def scenario(server):
        look = split_prefill.request_state

        def end_at_the_first_token(engine, name):
            """Cancel the task that looks, as the request's end does."""
            state = look(engine, name)
            if not state.is_prefilling:
                asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            return state

        monkeypatch.setattr(split_prefill, "request_state", end_at_the_first_token)
        await server.generate(TOKENS, STAR, max_tokens=20)

    simulate(scenario)


def test_pages_that_have_become_cached_meanwhile_are_not_fetched(simulate):
    """Two prompts differ in their last blocks. The second one's part computes block 5, which the first one's lacks."""
    other = TOKENS[:390] + random_ids(1, 130)

    async def scenario(server):
        busy = asyncio.create_task(server.generate(random_ids(9, 2500), name="busy", data_parallel_rank=2))
        first = asyncio.create_task(server.generate(TOKENS, STAR, "first"))
        await asyncio.sleep(0.08)
        await server.generate(other, STAR, "second")
        await asyncio.gather(first, busy)
        fetches = [metadata_of(request).fetch for request in whole_requests(server)]
        assert [fetch.span(PAGE_SIZE) for fetch in fetches] == [(320, 480), (448, 480)]
        assert server.replicas[0].fetched == [5 - 2, 1]

    simulate(scenario)


@pytest.mark.parametrize(
    ("choices", "is_cached", "computed", "num_warnings"),
    [(4, True, [480, 512, 480, 512], 0), (1, False, [0], 1)],
    ids=["by another choice", "the start is lost"],
)
def test_pages_that_are_not_fetched_are_reported_only_where_they_are_computed_again(
    simulate, monkeypatch, caplog, choices, is_cached, computed, num_warnings
):
    """Two of four choices fetch the pages. The others, which come later, find these pages in the cache."""
    monkeypatch.setattr(logging.getLogger("vllm.starling"), "propagate", True)

    async def scenario(server):
        pool = server.replicas[0].pool
        if not is_cached:
            monkeypatch.setattr(pool, "get_cached_block", lambda *args: None)
        await server.generate(TOKENS, STAR, n=choices, temperature=1.0)
        assert [start for start, _ in server.work()[0][1:]] == computed

    simulate(scenario)
    warnings = [record for record in caplog.records if "computed here instead" in record.getMessage()]
    assert len(warnings) == num_warnings


def test_replicas_with_different_pages_are_refused_with_both_layouts(simulate):
    async def scenario(server):
        server.replicas[1].set_layout({"dtype": "bfloat16"})
        message = r"replicas 0 and 1 can't share a prompt.*'float32' here, 'bfloat16' there"
        with pytest.raises(ValueError, match=message):
            await server.generate(TOKENS, STAR)
        assert server.work() == [[], [], []]

    simulate(scenario)


def test_parts_have_ids_of_their_own_where_vllm_leaves_ids_as_they_are(simulate, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")

    async def scenario(server):
        outputs = await server.generate(TOKENS, STAR)
        assert outputs[-1].outputs[0].token_ids == [7, 7, 7]
        assert len(server.work()[1]) == 2, "the other replica has computed the anchor and its part"

    simulate(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_random_prompts_at_once(simulate, seed):
    """Split prompts that share blocks, beside dense ones; some are cancelled."""
    draw = random.Random(seed)
    blocks = [random_ids(number, 64) for number in range(12)]

    async def scenario(server):
        async def one(number: int) -> None:
            await asyncio.sleep(draw.random() * 2)
            context = [token for block in draw.choices(blocks, k=draw.randrange(2, 12)) for token in block]
            ids = context[draw.randrange(64) :] + random_ids(seed, draw.randrange(1, 60))
            star = draw.choice([STAR, SHARDS, STAR | {"star_replicas": 3}, SHARDS | {"star_replicas": 3}, {}])
            if star:
                star = star | {"star_query_tokens": draw.randrange(1, 60)}
            running = asyncio.create_task(server.generate(ids, star, f"r{number}", max_tokens=draw.randrange(1, 20)))
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random() * 2)
                running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            if not running.cancelled():
                assert running.result()[-1].finished

        await asyncio.gather(*(one(number) for number in range(12)))

    simulate(scenario)
