"""Readers that read late, while the source's requests take the pages that it has released: no such page counts.

The source is vLLM's real scheduler and what its two model runners do with a connector in a step. A step's forward
writes to the pages of its requests, and readers read in the middle of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from starling.features.replicas.connector import StarConnector
from starling.features.replicas.page_transfer import PageReader, Transfer, TransferError
from starling.scheduler.planning.request_metadata import PromptPart, RequestMetadata
from tests.unit.replicas.test_connector import config, connected_scheduler  # noqa: F401
from tests.unit.replicas.test_page_transfer import wait
from tests.unit.scheduler.simulation import PAGE_SIZE, Engine, random_ids

PAGES = 40
TAKEN = 22
"""Pages that no request gets, so that released ones are soon taken again."""
STEP_TOKENS = 512
LAYOUT = {"dtype": "int64"}
WHICH = st.integers(0, 7)
"""A hold. Odd: the one that was released last, if there is one."""
BETWEEN = st.one_of(
    st.tuples(st.just("hold"), st.integers(1, 6)),  # pages
    st.tuples(st.just("compute"), st.integers(6, 16)),  # pages
    st.tuples(st.just("release"), WHICH),
    st.tuples(st.just("read"), WHICH),
)
STEPS = st.lists(st.tuples(st.lists(BETWEEN, max_size=3), WHICH), min_size=4, max_size=25)
"""For each step what comes before it, and which hold is read in the middle of its forward."""


class Source(Engine):
    """A replica whose pages others read.

    Args:
        around: what a model runner of vLLM does with the connector around the forward of a step.
        read: called in the middle of each forward.
    """

    def __init__(self, scheduler: Any, memory: np.ndarray, around: Any, read: Callable[[], None]) -> None:
        super().__init__(scheduler)
        self.memory, self.around, self.read = memory, around, read

    def _run(self, output: Any) -> dict[str, list[int]]:
        with self.around(output):
            sampled = super()._run(output)
            self.read()
        return sampled

    def _forget(self, output: Any) -> None:
        super()._forget(output)
        if not output.total_num_scheduled_tokens:
            with self.around(output):
                pass


def steps_of(runner: str, vllm_config: Any) -> Any:
    """A context manager around a step's forward, in which vLLM's own code calls the connector."""
    v2 = ActiveKVConnector(vllm_config, {})

    @contextmanager
    def around(output: Any) -> Iterator[None]:
        with set_forward_context(None, vllm_config):
            if runner == "V1":
                from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

                with KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output):
                    yield
            else:
                v2.pre_forward(output)
                yield
                v2.finish_forward()
                v2.post_forward(output.finished_req_ids)

    return around


@dataclass(eq=False)
class Held:
    """A hold of the source, and what its pages had in them when it began: (pages, page size) int64."""

    name: str
    number: int
    page_ids: list[int]
    content: np.ndarray


class Pair:
    """A source and a reader of its pages; each run begins with ``begin``."""

    def __init__(self, vllm_config: Any, runner: str, patch: Any) -> None:
        self.config, self.runner, self.patch = vllm_config, runner, patch
        self.theirs, self.ours = (torch.zeros(PAGES, PAGE_SIZE, dtype=torch.int64) for _ in range(2))
        self.source = PageReader(f"late-source-{runner}", {"layer": self.theirs}, PAGES, LAYOUT, 300.0)
        self.reader = PageReader(f"late-reader-{runner}", {"layer": self.ours}, PAGES, LAYOUT, 300.0)
        self.counts: Counter[str] = Counter()

    def begin(self) -> None:
        scheduler = connected_scheduler(self.config)
        scheduler.max_num_scheduled_tokens = STEP_TOKENS
        scheduler.kv_cache_manager.block_pool.get_new_blocks(TAKEN)
        worker = StarConnector(scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config)
        worker.connector_worker.reader = self.source
        self.patch.setattr(worker, "register_kv_caches", lambda caches: None)
        self.patch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", worker)
        self.theirs.zero_()
        self.source.holds.released.zero_()
        self.side = scheduler.connector.connector_scheduler
        around = steps_of(self.runner, scheduler.vllm_config)
        self.engine = Source(scheduler, self.theirs.numpy(), around, lambda: self.read(self.next))
        self.held: list[Held] = []
        self.released: list[Held] = []
        self.next, self.num_requests = 0, 0

    def do(self, action: str, number: int) -> None:
        if action in ("hold", "compute"):
            self.num_requests += 1
            name = f"{action}-{self.num_requests}"
            tokens = number * PAGE_SIZE
            part = RequestMetadata(part=PromptPart(name, 0, tokens)) if action == "hold" else None
            ids = random_ids(self.num_requests, tokens)
            self.engine.add(name, None, ids, max_tokens=1, metadata=part)
        elif self.held and action == "release":
            hold = self.held[number % len(self.held)]
            self.side.release([hold.name])
            self.released.append(hold)
        else:
            self.read(number)

    def step(self, read: int) -> None:
        """A step, in the middle of whose forward a hold is read."""
        self.next = read
        self.engine.step()
        known = {hold.name for hold in self.held}
        for name, hold in self.side.holds.items():
            if name not in known:
                page_ids = [page.block_id for page in hold.pages]
                self.held.append(Held(name, hold.number, page_ids, self.engine.memory[page_ids].copy()))

    def read(self, which: int) -> None:
        """Read a hold's pages: either they count, and are what was held, or the hold was released."""
        if not self.held:
            return
        hold = self.released[-1] if which % 2 and self.released else self.held[which % len(self.held)]
        local = list(range(len(hold.page_ids)))
        transfer = Transfer()
        self.reader.begin(transfer, self.source.address(), hold.number, hold.page_ids, local)
        is_overwritten = not np.array_equal(self.engine.memory[hold.page_ids], hold.content)
        try:
            wait(self.reader, transfer)
        except TransferError:
            self.reader.cancel(transfer)
            assert hold in self.released
            self.counts["overwritten" if is_overwritten else "released"] += 1
        else:
            assert np.array_equal(self.ours[local].numpy(), hold.content), "pages of others count as those of a hold"
            self.counts["held"] += 1


@pytest.fixture(params=["V1", "V2"])
def pair(request, config, monkeypatch):  # noqa: F811
    monkeypatch.setattr("starling.features.replicas.worker_connector.get_tensor_model_parallel_rank", lambda: 0)
    made = Pair(config, request.param, monkeypatch)
    yield made
    made.reader.close()
    made.source.close()


def test_no_page_that_was_overwritten_counts_as_held(pair):
    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(STEPS)
    def run(steps) -> None:
        pair.begin()
        for between, read in steps:
            for action, number in between:
                pair.do(action, number)
            pair.step(read)

    run()
    assert min(pair.counts[fact] for fact in ("held", "released", "overwritten")) > 0
