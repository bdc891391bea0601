"""Where the documents of a prompt came from, as a response says it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starling.engine_ext.engine_core import AsyncStarScheduler, StarScheduler
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import SOURCES
from starling.scheduler.provenance import Provenance, document_sources, with_peers
from tests.unit.scheduler.library_engine import PAGE_SIZE, LibraryEngine, library_config
from tests.unit.scheduler.simulation import random_ids

HEAD, LENGTHS, QUERY = 16, (20, 12, 33), 5


def plan_of(lengths: tuple[int, ...] = LENGTHS) -> StarPlan:
    """Documents behind a head of two pages, each on pages of its own."""
    documents, start = [(0, HEAD)], HEAD
    for length in lengths:
        documents.append((start, start + length))
        start += -(-length // PAGE_SIZE) * PAGE_SIZE
    return StarPlan(64, HEAD, 0, start, start + QUERY, documents=tuple(documents), padding_token=0)


def counts(computed: int, **others: int) -> dict[str, int]:
    return {"memory": 0, "host": 0, "storage": 0, "peer": 0} | others | {"computed": computed}


def test_padding_counts_for_nothing() -> None:
    spans = [(0, 24, "memory"), (24, 32, "host"), (40, 56, "storage"), (56, 64, "peer")]
    assert document_sources(plan_of(), spans) == [
        counts(4, memory=8, host=8),
        counts(0, storage=12),
        counts(25, peer=8),
    ]
    assert document_sources(plan_of(), []) == [counts(20), counts(12), counts(33)]


def test_what_other_replicas_computed_is_theirs() -> None:
    spans = [(0, 32, "memory"), (32, 64, "memory")]
    assert with_peers(spans, 16, 40) == [(0, 16, "memory"), (40, 64, "memory"), (16, 40, "peer")]
    assert with_peers([], 8, 16) == [(8, 16, "peer")]


def test_only_the_first_output_has_them() -> None:
    kinds = {1: "memory", 2: "host"}
    provenance = Provenance({}, SimpleNamespace(page_size=PAGE_SIZE))
    provenance.source_of = lambda page, request_id: kinds[page]
    request = SimpleNamespace(request_id="a", sampling_params=None)
    provenance.take(request, 0, [1, 2])
    assert not provenance.noted, "a request without documents"
    provenance.noted["a"] = plan_of(), []
    provenance.take(request, 2, [1, 1, 2])
    other = SimpleNamespace(request_id="a", prefill_stats=None, kv_transfer_params=None)
    assert provenance.give(other) == []
    first = SimpleNamespace(request_id="a", prefill_stats=object(), kv_transfer_params={"theirs": 1})
    assert provenance.give(first)[0] == counts(0, memory=16, host=4)
    assert first.kv_transfer_params["theirs"] == 1
    assert len(first.kv_transfer_params[SOURCES]) == 3
    assert provenance.give(first) == []
    provenance.noted["b"] = plan_of(), []
    provenance.outputs({})
    assert not provenance.noted


class Noting(LibraryEngine):
    """Keeps what outputs say of their documents."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sources: dict[str, list[dict[str, int]]] = {}
        update = self.scheduler.update_from_output

        def noted(*of_step: Any) -> Any:
            result = update(*of_step)
            for outputs in result.values():
                for output in outputs.outputs:
                    if output.kv_transfer_params:
                        assert output.request_id not in self.sources
                        self.sources[output.request_id] = output.kv_transfer_params[SOURCES]
            return result

        self.scheduler.update_from_output = noted


@pytest.mark.parametrize(("scheduler", "v2", "ahead"), [(StarScheduler, False, 0), (AsyncStarScheduler, True, 1)])
def test_a_response_says_where_each_document_came_from(tmp_path: Path, scheduler: Any, v2: bool, ahead: int) -> None:
    """Computed, then in memory, then in host memory, and in files once the engine has started again."""
    config = library_config(tmp_path / "models", 2**20, tmp_path / "pages")
    engine = Noting(config, scheduler, 100, v2=v2, ahead=ahead)
    first, second, third = (random_ids(seed, length) for seed, length in enumerate(LENGTHS))
    head, query = random_ids(50, HEAD), random_ids(51, QUERY)

    def ask(engine: Noting, name: str, *documents: list[int]) -> list[dict[str, int]]:
        ids = [*head, *(token for document in documents for token in document), *query]
        engine.add(name, plan_of(tuple(map(len, documents))), ids)
        engine.run(limit=10**6)  # files are read by threads
        return engine.sources[name]

    assert ask(engine, "cold", first, second) == [counts(20), counts(12)]
    assert ask(engine, "again", second, first) == [counts(0, memory=12), counts(0, memory=20)]
    assert engine.scheduler.reset_prefix_cache()
    assert ask(engine, "host", third, first) == [counts(33), counts(0, host=20)]
    assert ask(engine, "now in memory", first, second) == [counts(0, memory=20), counts(0, host=12)]
    (tier,) = engine.library.manager.secondary_tiers
    tier.drain_jobs()
    engine.close()
    again = Noting(config, scheduler, 100, v2=v2, ahead=ahead)
    assert ask(again, "after a restart", second, third) == [counts(0, storage=12), counts(0, storage=33)]
    again.close()
