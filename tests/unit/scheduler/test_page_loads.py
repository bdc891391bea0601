"""Pages that a request loads from the library, behind holes too: how many are computed, and that each one is right."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from vllm.config import KVEventsConfig
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.features.library import core
from starling.features.library.core import PageLoads
from starling.features.library.tier import LATER_SECONDS
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import PageFetch, PageSource, PromptPart, RequestMetadata
from tests.stateful import CountingMachine, Length, run_machine
from tests.unit.scheduler.library_engine import PAGE_SIZE, LibraryEngine, check_chunks, library_config, with_replicas
from tests.unit.scheduler.simulation import random_ids

BLOCK, BLOCKS, QUERY, NEW = 32, 6, 13, 3
CONTEXT = BLOCK * BLOCKS
LENGTH = CONTEXT + QUERY
PLAN = StarPlan(BLOCK, BLOCK, 0, CONTEXT, LENGTH)
KINDS = {
    "v1": (StarScheduler, False, 0),
    "v2": (StarScheduler, True, 0),
    "async v1": (AsyncStarScheduler, False, 1),
    "async v2": (AsyncStarScheduler, True, 1),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_config(tmp_path_factory.mktemp("models"), 2**20)


def make_engine(config: Any, kind: str = "v1", num_pages: int = 100, delay: int = 1) -> LibraryEngine:
    scheduler_type, v2, ahead = KINDS[kind]
    return LibraryEngine(config, scheduler_type, num_pages, delay, v2=v2, ahead=ahead)


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, config: Any) -> Iterator[LibraryEngine]:
    made = make_engine(config, request.param)
    yield made
    made.close()


def add_part(engine: LibraryEngine, name: str, ids: list[int], start: int, stop: int) -> None:
    """Let an engine prefill the blocks ``[start, stop)`` of a prompt, and hold their pages until they are released."""
    metadata = RequestMetadata(part=PromptPart(name, start * BLOCK, BLOCK))
    engine.add(name, PLAN, ids[: stop * BLOCK], metadata=metadata, max_tokens=1)


def release(engine: LibraryEngine | None) -> None:
    """Release all pages that parts hold."""
    assert engine is not None
    engine.scheduler.connector.release(list(engine.scheduler.connector.holds))


def documents_plan(lengths: Sequence[int], anchor_size: int = 0) -> StarPlan:
    """The plan of a prompt of documents of so many tokens; the first one is the head if there is an anchor."""
    sizes = [-(-length // PAGE_SIZE) * PAGE_SIZE for length in lengths]
    starts = [0, *accumulate(sizes)]
    spans = tuple((start, start + length) for start, length in zip(starts, lengths, strict=False))
    return StarPlan(BLOCK, anchor_size, 0, starts[-1], starts[-1] + QUERY, documents=spans)


def replaced(ids: list[int], *blocks: int, seed: int = 50) -> list[int]:
    """The prompt with other tokens in these blocks."""
    changed = list(ids)
    for block in blocks:
        changed[block * BLOCK : (block + 1) * BLOCK] = random_ids(seed + block, BLOCK)
    return changed


def forget(engine: LibraryEngine) -> None:
    """Empty the engine's own cache."""
    assert engine.scheduler.reset_prefix_cache()


def only_in_the_library(engine: LibraryEngine) -> list[int]:
    """A prompt that the engine has computed, and of which it has nothing in its own cache any more."""
    ids = random_ids(1, LENGTH)
    engine.add("first", PLAN, ids)
    engine.run()
    forget(engine)
    return ids


def test_a_forgotten_prompt_is_loaded(engine: LibraryEngine) -> None:
    ids = only_in_the_library(engine)
    engine.add("second", PLAN, ids)
    engine.run()
    assert engine.computed["second"] == LENGTH - (LENGTH - 1) // PAGE_SIZE * PAGE_SIZE + NEW - 1
    engine.check_pages()


@pytest.mark.parametrize("missing", [(0,), (1,), (3,), (5,), (2, 4), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("delay", [1, 6])
def test_what_is_behind_a_hole_is_loaded(config: Any, missing: tuple[int, ...], delay: int) -> None:
    engine = make_engine(config, delay=delay)
    ids = only_in_the_library(engine)
    engine.add("second", PLAN, replaced(ids, *missing))
    engine.run()
    # A block depends on the anchor, which is block 0. Pages of the query depend on everything.
    blocks = BLOCKS if 0 in missing else len(missing)
    assert engine.computed["second"] == blocks * BLOCK + QUERY + NEW - 1
    assert len(engine.loaded) == (BLOCKS - blocks) * BLOCK // PAGE_SIZE
    engine.check_pages()
    engine.close()


def test_what_is_nowhere_is_computed_while_others_arrive(config: Any) -> None:
    """Blocks 0 and 1 are nowhere. They are computed in the steps in which the others, which take long, arrive."""
    engine = make_engine(config, delay=5)
    ids = only_in_the_library(engine)
    engine.add("second", PLAN, [*ids[:BLOCK], *random_ids(9, BLOCK), *ids[2 * BLOCK :]])
    engine.step()
    engine.step()
    assert engine.transfers, "the loads have begun"
    began = engine.computed["second"]
    assert began > 0 or engine.scheduler.part(PageLoads).loading
    engine.run()
    assert engine.computed["second"] == BLOCK + QUERY + NEW - 1
    engine.close()


def test_two_requests_share_a_load(config: Any) -> None:
    engine = make_engine(config, delay=3)
    ids = only_in_the_library(engine)
    engine.add("second", PLAN, ids)
    engine.add("third", PLAN, replaced(ids, 4))
    engine.run()
    assert len(engine.loaded) == len(set(engine.loaded)) == LENGTH // PAGE_SIZE
    assert engine.computed["third"] == BLOCK + QUERY + NEW - 1
    engine.check_pages()
    engine.close()


def test_documents_that_repeat_or_begin_alike_are_loaded_once(engine: LibraryEngine) -> None:
    """The first and the last document are the same one, and the second begins as they do."""
    text, other = random_ids(1, BLOCK), random_ids(2, BLOCK)
    repeated = [*text, *text[: 2 * PAGE_SIZE], *other[2 * PAGE_SIZE :], *text, *random_ids(3, QUERY)]
    plan = documents_plan([BLOCK] * 3)
    engine.add("first", plan, repeated)
    engine.run()
    forget(engine)
    engine.add("second", plan, repeated)
    engine.run()
    different = (2 * BLOCK - 2 * PAGE_SIZE + QUERY) // PAGE_SIZE
    assert len(engine.loaded) == len(set(engine.loaded)) == different
    assert engine.computed["second"] == QUERY % PAGE_SIZE + NEW - 1
    engine.check_pages()


def test_a_document_that_repeats_in_a_step_takes_one_chunk_for_each_page(engine: LibraryEngine) -> None:
    """And the chunk has the page: it is loaded from there."""
    plan, text = documents_plan([BLOCK] * 3), random_ids(1, BLOCK)
    ids = [*text, *text, *text, *random_ids(2, QUERY)]
    engine.add("first", plan, ids)
    engine.run()
    host = engine.library.manager.primary_tier
    assert host._num_chunks - host._get_num_free_chunks() == (BLOCK + QUERY) // PAGE_SIZE
    check_chunks(engine.library.manager)
    forget(engine)
    engine.add("second", plan, ids)
    engine.run()
    assert engine.computed["second"] == QUERY % PAGE_SIZE + NEW - 1
    engine.check_pages()
    check_chunks(engine.library.manager)


def test_a_request_may_end_while_a_page_that_it_has_twice_is_stored(engine: LibraryEngine) -> None:
    """The library was emptied, so that pages which the request has found are stored once more."""
    plan, text = documents_plan([BLOCK] * 2), random_ids(1, BLOCK)
    ids = [*text, *text, *random_ids(2, QUERY)]
    engine.add("first", plan, ids)
    engine.run()
    engine.scheduler.connector.reset_cache()
    engine.add("second", plan, ids)
    engine.run_until(lambda: bool(engine.stores))
    engine.scheduler.finish_requests(["second"], RequestStatus.FINISHED_ABORTED)
    engine.run()
    engine.check_pages()
    check_chunks(engine.library.manager)


def test_a_library_larger_than_host_memory_is_found_in_files(tmp_path: Path) -> None:
    """Host memory holds a little more than one of three prompts. All of them are found, in any order."""
    pages = LENGTH // PAGE_SIZE
    config = library_config(tmp_path / "models", 2**20, tmp_path / "pages")
    config.kv_transfer_config.kv_connector_extra_config["cpu_bytes_to_use"] = (pages + 5) * 4096
    engine = make_engine(config)
    (tier,) = engine.library.manager.secondary_tiers
    prompts = [random_ids(seed, LENGTH) for seed in range(3)]
    for number, ids in enumerate(prompts):
        engine.add(f"cold {number}", PLAN, ids)
        engine.run()
        tier.drain_jobs()
        engine.step()
    assert len(list((tmp_path / "pages").rglob("*.bin"))) == 3 * pages
    for number, ids in enumerate(prompts):
        forget(engine)
        engine.add(f"warm {number}", PLAN, ids)
        engine.run(limit=10**6)
        assert engine.computed[f"warm {number}"] == LENGTH - pages * PAGE_SIZE + NEW - 1
    engine.check_pages()
    engine.close()


def test_a_document_that_is_to_go_is_not_stored_and_one_that_is_to_stay_counts_as_used_later(tmp_path: Path) -> None:
    spans = ((0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, 3 * BLOCK))
    plan = StarPlan(BLOCK, BLOCK, 0, 3 * BLOCK, 3 * BLOCK + QUERY, documents=spans)
    engine = make_engine(library_config(tmp_path / "models", 2**20, tmp_path / "pages"))
    (tier,) = engine.library.manager.secondary_tiers
    engine.add("first", plan, random_ids(1, 3 * BLOCK + QUERY), metadata=RequestMetadata(retention=("low", "high")))
    engine.run()
    tier.drain_jobs()
    tier.write_used()
    used = sorted(file.stat().st_mtime - time.time() > LATER_SECONDS / 2 for file in tmp_path.rglob("*.bin"))
    question = QUERY // PAGE_SIZE
    assert used == [False] * question + [True] * (2 * BLOCK // PAGE_SIZE), "the head has the higher word"
    engine.close()


def test_a_load_takes_no_page_that_the_request_has_found(config: Any) -> None:
    """Block 0 is in the free pages that would be taken first, block 1 is nowhere: the request starts at once."""
    engine = make_engine(config, num_pages=40)
    ids = only_in_the_library(engine)
    engine.add("head", None, ids[: BLOCK + 1])
    engine.run()
    others = engine.pool.get_num_free_blocks() - BLOCK // PAGE_SIZE
    engine.add("others", None, random_ids(7, others * PAGE_SIZE - NEW))  # takes all other pages, which were free longer
    engine.run()
    loaded = len(engine.loaded)
    engine.add("second", PLAN, replaced(ids, 1))
    engine.run()
    assert len(engine.loaded) - loaded == (BLOCKS - 2) * BLOCK // PAGE_SIZE
    assert engine.computed["second"] == BLOCK + QUERY + NEW - 1
    engine.check_pages()
    engine.close()


def test_kv_events_say_where_a_page_is(tmp_path: Path) -> None:
    """In the engine's memory, in host memory, and in files, by the same hashes."""
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = make_engine(library_config(tmp_path / "models", 2**20, tmp_path / "pages", kv_events_config=events))
    stored: dict[str, set[bytes]] = defaultdict(set)

    def publish(batch: Any) -> None:
        for event in batch.events:
            stored[event.medium].update(event.block_hashes)

    engine.scheduler.kv_event_publisher.publish = publish
    engine.add("first", PLAN, random_ids(1, LENGTH))
    engine.run()
    (tier,) = engine.library.manager.secondary_tiers
    tier.drain_jobs()
    engine.step()
    engine.step()
    assert set(stored) == {"GPU", "CPU", "STORAGE"}
    assert stored["GPU"] == stored["CPU"] == stored["STORAGE"] and len(stored["GPU"]) == LENGTH // PAGE_SIZE
    engine.close()


def test_a_request_does_not_wait_for_ever(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(config, delay=10**6)
    ids = only_in_the_library(engine)
    monkeypatch.setattr(core, "PATIENCE_SECONDS", -1.0)
    engine.add("second", PLAN, ids)
    engine.run()
    assert engine.computed["second"] == LENGTH + NEW - 1
    engine.close()


@pytest.mark.parametrize("is_star", [True, False])
def test_steps_without_tokens_pause_while_a_disk_is_slow_and_no_other_step_does(
    config: Any, is_star: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(config)
    ids = only_in_the_library(engine)
    pauses: list[float] = []
    monkeypatch.setattr("starling.features.library.connector.time.sleep", pauses.append)
    engine.add("second", PLAN if is_star else None, ids)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.library.manager), "lookup", lambda *_: LookupResult.RETRY)
        assert not any(engine.step() for _ in range(40))
    assert pauses == [min(step, 20) / 1000 for step in range(1, 41)]
    pauses.clear()
    has_tokens = [engine.step() for _ in range(30)]
    assert engine.scheduler.get_num_unfinished_requests() == 0
    assert not any(pause for pause, tokens in zip(pauses, has_tokens, strict=True) if tokens)
    engine.close()


def test_an_aborted_request_leaves_no_page_in_use(engine: LibraryEngine) -> None:
    ids = only_in_the_library(engine)
    engine.add("second", PLAN, ids)
    engine.step()
    engine.scheduler.finish_requests(["second"], RequestStatus.FINISHED_ABORTED)
    engine.run()
    engine.check_pages()
    assert not engine.scheduler.part(PageLoads).wanted
    assert not engine.scheduler.part(PageLoads).loading


def test_a_reset_of_the_library_while_pages_arrive(config: Any) -> None:
    """They are not taken for pages of the prompt."""
    engine = make_engine(config, delay=4)
    ids = only_in_the_library(engine)
    engine.add("second", PLAN, ids)
    engine.step()
    engine.scheduler.connector.reset_cache()
    engine.run()
    assert engine.computed["second"] == LENGTH + NEW - 1
    engine.check_pages()
    engine.close()


def test_a_reset_that_preempts_a_request_which_then_loads_its_pages(engine: LibraryEngine) -> None:
    """It starts again in the step after the reset, from pages of the library."""
    engine.add("first", None, random_ids(1, LENGTH), max_tokens=20)
    engine.run_until(lambda: engine.computed["first"] > LENGTH)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert engine.loaded
    engine.check_pages()


def test_a_part_of_a_prompt_is_loaded_but_what_it_leaves_out_is_neither_loaded_nor_stored(config: Any) -> None:
    """Blocks 3 to 5 of a prompt, whose blocks 1 and 2 are prefilled on another replica. Block 0 is the anchor."""
    engine = make_engine(with_replicas(config))
    ids = random_ids(1, LENGTH)
    engine.add("anchor", None, ids[: BLOCK + 1])  # as the front does before the parts
    engine.run()
    add_part(engine, "first", ids, 3, 6)
    engine.run()
    assert len(engine.scheduler.connector.held_pages("first")) == 3 * BLOCK // PAGE_SIZE
    release(engine)
    forget(engine)
    add_part(engine, "second", ids, 3, 6)
    engine.run()
    assert engine.computed["first"] == 3 * BLOCK
    assert engine.computed["second"] == PAGE_SIZE, "the last page, of which one token must be computed"
    release(engine)
    forget(engine)
    loaded = len(engine.loaded)
    engine.add("whole", PLAN, ids)
    engine.run()
    assert len(engine.loaded) - loaded == 4 * BLOCK // PAGE_SIZE
    assert engine.computed["whole"] == 2 * BLOCK + QUERY + NEW - 1
    engine.check_pages()
    engine.close()


def test_what_is_fetched_from_another_replica_is_not_asked_for(config: Any) -> None:
    engine = make_engine(with_replicas(config))
    ids = only_in_the_library(engine)
    engine.add("head", None, ids[: BLOCK + 1])
    engine.run()
    loaded = len(engine.loaded)
    pages = list(range((BLOCKS - 1) * BLOCK // PAGE_SIZE))
    fetch = PageFetch((PageSource(BLOCK, pages, [{"name": "there"}], 1),))
    engine.add("whole", PLAN, ids, metadata=RequestMetadata(fetch=fetch))
    output = engine.scheduler.schedule()
    (load,) = output.kv_connector_metadata.metadata[0].loads
    assert load.request_id == "whole" and len(load.local_page_ids()) == len(pages)
    assert not output.kv_connector_metadata.metadata[1].load_jobs
    assert len(engine.loaded) == loaded and not engine.scheduler.part(PageLoads).wanted
    engine.close()


class LibraryMachine(CountingMachine):
    """Requests whose blocks come from a small set, on an engine with few pages; Engine checks all KV that is read."""

    config: Any

    def __init__(self) -> None:
        super().__init__()
        self.engine: LibraryEngine | None = None
        self.number = 0

    @precondition(lambda self: self.engine is None)
    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        num_pages=st.sampled_from((40, 100)),
        delay=st.integers(0, 6),
        has_replicas=st.booleans(),
    )
    def start(self, kind: str, num_pages: int, delay: int, has_replicas: bool) -> None:
        config = with_replicas(self.config) if has_replicas else self.config
        self.engine = make_engine(config, kind, num_pages, delay)

    @precondition(lambda self: self.engine is not None)
    @rule(blocks=st.lists(st.integers(0, 2), min_size=BLOCKS, max_size=BLOCKS), star=st.booleans())
    def add(self, blocks: list[int], star: bool) -> None:
        ids = [token for place, seed in enumerate(blocks) for token in random_ids(seed + 10 * place, BLOCK)]
        self.number += 1
        assert self.engine is not None
        self.engine.add(f"{self.number}", PLAN if star else None, [*ids, *random_ids(blocks[0], QUERY)])

    @precondition(lambda self: self.engine is not None)
    @rule(
        documents=st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from((BLOCK, BLOCK, BLOCK - 3))),
            min_size=2,
            max_size=BLOCKS,
        ),
        anchor_size=st.sampled_from((0, BLOCK // 2)),
        retention=st.sampled_from((None, None, "low", "high")),
    )
    def add_documents(self, documents: list[tuple[int, int, int]], anchor_size: int, retention: str | None) -> None:
        """Of documents that begin alike or are the same; each is a beginning, an end and a length."""
        texts = [
            [*random_ids(beginning, BLOCK // 2), *random_ids(10 + end, BLOCK // 2)][:length]
            for beginning, end, length in documents
        ]
        plan = documents_plan([len(text) for text in texts], anchor_size)
        self.number += 1
        assert self.engine is not None
        ids = [token for text in texts for token in text]
        metadata = RequestMetadata(retention=retention)
        self.engine.add(f"{self.number}", plan, [*ids, *random_ids(documents[0][0], QUERY)], metadata=metadata)

    @precondition(lambda self: self.engine is not None and self.engine.has_replicas)
    @rule(blocks=st.lists(st.integers(0, 2), min_size=BLOCKS, max_size=BLOCKS), start=st.integers(1, BLOCKS - 1))
    def add_part(self, blocks: list[int], start: int) -> None:
        """Of a prompt that is prefilled on another replica too: it holds its pages."""
        ids = [token for place, seed in enumerate(blocks) for token in random_ids(seed + 10 * place, BLOCK)]
        self.number += 1
        assert self.engine is not None
        add_part(self.engine, f"{self.number}", ids, start, BLOCKS)

    @precondition(lambda self: self.engine is not None and self.engine.has_replicas)
    @rule()
    def release(self) -> None:
        release(self.engine)

    @precondition(lambda self: self.engine is not None)
    @rule(steps=st.integers(1, 8))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()  # type: ignore[union-attr]

    @precondition(lambda self: self.engine is not None and self.engine.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        scheduler = self.engine.scheduler  # type: ignore[union-attr]
        name = data.draw(st.sampled_from(sorted(scheduler.requests)))
        scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    @precondition(lambda self: self.engine is not None and self.engine.scheduler.running and not self.engine.in_flight)
    @rule()
    def preempt(self) -> None:
        scheduler = self.engine.scheduler  # type: ignore[union-attr]
        scheduler._preempt_request(scheduler.running.pop(), 0.0)

    @precondition(lambda self: self.engine is not None)
    @rule(whole=st.booleans())
    def reset(self, whole: bool) -> None:
        self.engine.scheduler.reset_prefix_cache(reset_connector=whole)  # type: ignore[union-attr]

    @invariant()
    def no_page_is_lost(self) -> None:
        if self.engine is not None:
            loads = self.engine.scheduler.part(PageLoads)
            assert len(loads.loading) == sum(len(load.hashes) for load in self.engine.library.page_loads.values())

    def teardown(self) -> None:
        if self.engine is not None:
            while self.engine.has_replicas and self.engine.scheduler.has_unfinished_requests():
                self.engine.step()
                release(self.engine)  # else others might wait for the pages
            self.engine.run()
            if self.engine.has_replicas:
                release(self.engine)
            self.engine.check_pages()
            check_chunks(self.engine.library.manager)
            self.totals["requests"] += self.number
            self.totals["loaded pages"] += len(self.engine.loaded)
            self.engine.close()


def test_random_requests_read_the_right_pages(config: Any, pytestconfig: pytest.Config) -> None:
    machine = type("LibraryMachine", (LibraryMachine,), {"config": config, "totals": Counter()})
    run_machine(machine, Length.of(pytestconfig), runs=60, rules=25)
    assert machine.totals["loaded pages"] > 0
