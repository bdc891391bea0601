"""The connector between replicas on real schedulers without a model: pages held, fetched, lost, and released."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.engine.core import EngineCore
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from starling.engine_ext.engine_core import StarScheduler
from starling.features.replicas import replica_calls
from starling.features.replicas.connector import StarConnector
from starling.features.replicas.connector_metadata import PageLoad, PageLoads, PageRead, WorkerAddress
from starling.features.replicas.page_transfer import TransferError, layout_mismatch
from starling.features.replicas.replica_calls import replica_state
from starling.features.replicas.worker_connector import WorkerConnector
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import (
    PageFetch,
    PageSource,
    PromptPart,
    RequestMetadata,
)
from tests.unit.scheduler.simulation import PAGE_SIZE, answer, make_request, make_scheduler, run_to_end
from tests.unit.scheduler.test_star_scheduler import config  # noqa: F401

PLAN = StarPlan(64, 64, 0, 290, 300, 2)
ADDRESS = {"name": "there", "layout": {"page_tokens": PAGE_SIZE}}


def connected_scheduler(config, **extra):  # noqa: F811
    """A scheduler with the connector; ``extra`` is the connector's configuration."""
    given = copy.copy(config)
    given.kv_transfer_config = KVTransferConfig(
        kv_connector="StarConnector",
        kv_connector_module_path="starling.features.replicas.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )
    made = make_scheduler(given, StarScheduler)
    made.connector.set_xfer_handshake_metadata({0: WorkerAddress(ADDRESS)})
    return made


@pytest.fixture
def scheduler(config):  # noqa: F811
    return connected_scheduler(config)


def part(name: str, start: int, stop: int):
    metadata = RequestMetadata(part=PromptPart(name, start, 64))
    return make_request(name, PLAN, stop, max_tokens=1, metadata=metadata)


def whole(name: str, start: int, page_ids: list[int]):
    sources = PageSource(start, page_ids[:2], [ADDRESS], 5), PageSource(start + 64, page_ids[2:], [ADDRESS], 6)
    metadata = RequestMetadata(fetch=PageFetch(sources))
    return make_request(name, PLAN, 300, metadata=metadata)


def free_pages(scheduler) -> int:
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def no_forward(scheduler, **output) -> None:
    """A step in which nothing runs; ``output`` is what the workers report of their transfers."""
    step = scheduler.schedule()
    assert not step.total_num_scheduled_tokens
    scheduler.update_from_output(step, ModelRunnerOutput([], {}, kv_connector_output=KVConnectorOutput(**output)))


def test_a_part_holds_its_pages_until_they_are_released(scheduler):
    request = part("mine", 128, 256)
    scheduler.add_request(request)
    run_to_end(scheduler)
    no_forward(scheduler)
    assert not scheduler.has_requests()  # an engine that only holds pages makes no steps
    assert len(scheduler.connector.held_pages("mine")) == 4 and free_pages(scheduler) == 39 - 4
    assert not scheduler.reset_prefix_cache()
    scheduler.connector.release(["mine", "mine", "unknown"])
    assert free_pages(scheduler) == 39
    assert scheduler.reset_prefix_cache()


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["waiting", "one chunk", "two chunks"])
def test_a_part_that_still_runs_when_its_pages_are_released_never_holds_them(scheduler, steps):
    """As where the abort of the part was lost."""
    core = object.__new__(EngineCore)
    core.scheduler = scheduler
    for name in ("mine", "other"):
        scheduler.add_request(part(name, 128, 256))
    for _ in range(steps):
        output = scheduler.schedule()
        scheduler.update_from_output(output, answer(output, {name: [] for name in output.num_scheduled_tokens}))
    assert "mine" in scheduler.requests
    replica_calls._release(core, ["mine"])
    run_to_end(scheduler)
    assert list(scheduler.connector.connector_scheduler.holds) == ["other"]
    replica_calls._release(core, ["other"])
    assert free_pages(scheduler) == 39


def test_a_finished_part_reports_its_pages_and_an_aborted_part_holds_none(scheduler):
    request = part("mine", 128, 256)
    scheduler.add_request(request)
    reported = {}
    finished = scheduler.connector.request_finished_all_groups

    def listen(request, block_ids):
        reported[request.request_id] = finished(request, block_ids)[1]
        return False, reported[request.request_id]

    scheduler.connector.request_finished_all_groups = listen
    run_to_end(scheduler)
    held = [page.block_id for page in scheduler.connector.held_pages("mine")]
    source = {"start": 128, "page_ids": held, "addresses": [ADDRESS], "hold": 1}
    assert reported["mine"] == {"name": "mine", "source": source}
    scheduler.connector.release(["mine"])
    scheduler.add_request(part("aborted", 0, 256))
    scheduler.schedule()
    scheduler.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    assert reported["aborted"] is None and not scheduler.connector.connector_scheduler.holds
    assert free_pages(scheduler) == 39


def test_pages_of_others_follow_our_own_and_become_ordinary_cached_pages(scheduler):
    scheduler.add_request(part("mine", 0, 128))
    run_to_end(scheduler)
    scheduler.add_request(whole("whole", 128, [21, 22, 30, 31, 32]))
    step = scheduler.schedule()
    assert not step.total_num_scheduled_tokens
    (load,) = step.kv_connector_metadata.loads
    ours = scheduler.kv_cache_manager.get_block_ids("whole")[0]
    assert load.reads == [
        PageRead([ADDRESS], 5, [21, 22], ours[4:6]),
        PageRead([ADDRESS], 6, [30, 31, 32], ours[6:9]),
    ]
    # The pages have not arrived yet: no other request may find them.
    assert replica_state(scheduler, hasher(), tokens(), PLAN, None).result()["cached"] == bytes([1, 1, 0, 0, 0])
    scheduler.update_from_output(
        step, ModelRunnerOutput([], {}, kv_connector_output=KVConnectorOutput(finished_recving={"whole"}))
    )
    assert run_to_end(scheduler) == 300 - 288 + 2
    scheduler.connector.release(["mine"])
    scheduler.add_request(make_request("again", PLAN))
    assert run_to_end(scheduler) == 300 - 288 + 2
    scheduler.add_request(make_request("dense", None))
    assert run_to_end(scheduler) == 300 - 64 + 2
    assert free_pages(scheduler) == 39 and scheduler.reset_prefix_cache()


def test_lost_pages_are_computed(scheduler):
    scheduler.add_request(part("mine", 0, 128))
    run_to_end(scheduler)
    scheduler.add_request(whole("whole", 128, [21, 22, 30, 31, 32]))
    step = scheduler.schedule()
    lost = step.kv_connector_metadata.loads[0].local_page_ids()
    output = KVConnectorOutput(finished_recving={"whole"}, invalid_block_ids=lost)
    scheduler.update_from_output(step, ModelRunnerOutput([], {}, kv_connector_output=output))
    assert run_to_end(scheduler) == 300 - 128 + 2
    scheduler.connector.release(["mine"])
    assert free_pages(scheduler) == 39


@pytest.mark.parametrize("own", [0, 64])
def test_without_its_own_start_a_request_fetches_nothing(scheduler, own):
    if own:
        scheduler.add_request(part("mine", 0, own))
        run_to_end(scheduler)
    scheduler.add_request(whole("whole", 128, [21, 22, 30, 31, 32]))
    assert run_to_end(scheduler) == 300 - own + 2


def test_a_request_that_is_aborted_while_it_fetches_leaves_no_page(scheduler):
    scheduler.add_request(part("mine", 0, 128))
    run_to_end(scheduler)
    scheduler.connector.release(["mine"])
    scheduler.add_request(whole("whole", 128, [21, 22, 30, 31, 32]))
    no_forward(scheduler)
    scheduler.finish_requests("whole", RequestStatus.FINISHED_ABORTED)
    assert free_pages(scheduler) < 39  # pages must not arrive where other requests own the memory
    no_forward(scheduler, finished_recving={"whole"})
    assert free_pages(scheduler) == 39
    assert replica_state(scheduler, hasher(), tokens(), PLAN, None).result()["cached"] == bytes([1, 1, 0, 0, 0])


def test_the_state_of_a_replica(scheduler):
    empty = replica_state(scheduler, hasher(), tokens(), PLAN, None).result()
    expected = {"cached": bytes(5), "has_anchor": False, "queued_tokens": 0, "pages": 39, "layout": ADDRESS["layout"]}
    assert empty == expected
    scheduler.add_request(part("anchor", 0, 64))
    run_to_end(scheduler)
    scheduler.add_request(part("mine", 128, 288))
    run_to_end(scheduler)
    scheduler.add_request(make_request("waiting", None))
    state = replica_state(scheduler, hasher(), tokens(), PLAN, None).result()
    assert (state["cached"], state["has_anchor"], state["queued_tokens"]) == (bytes([1, 0, 1, 1, 1]), True, 300)
    assert replica_state(scheduler, hasher(), tokens(), PLAN, "salt").result()["cached"] == bytes(5)
    assert replica_state(scheduler, hasher(), [], PLAN, None).result()["has_anchor"] is False


def test_fetched_tokens_count_as_those_of_other_replicas(scheduler):
    found = scheduler.connector.get_external_cache_hit_sources(make_request("any", PLAN), 64)
    assert found == {CacheHitSource.P2P: 64}, "vLLM's vllm:prompt_tokens_cached_by_source"


def test_tokens_that_a_part_leaves_out_are_no_hit(config):  # noqa: F811
    given = make_scheduler(config, StarScheduler)
    given.log_stats = False  # else each step takes the counts
    given.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    for request in (part("anchor", 0, 64), part("mine", 128, 256), make_request("whole", PLAN)):
        given.add_request(request)
        run_to_end(given)
    stats = given.kv_cache_manager.make_prefix_cache_stats()
    assert (stats.requests, stats.queries, stats.hits) == (1, 300, 64 + 128), "the anchor, and the part's blocks"


def hasher():
    return make_request("any", None)._block_hasher


def tokens() -> list[int]:
    return make_request("any", None).prompt_token_ids


class FakeReader:
    """Transfers that end as the test sets it."""

    def __init__(self) -> None:
        self.fails: TransferError | None = None
        self.finished = False
        self.cancelled = 0
        self.released: list[int] = []
        self.holds = SimpleNamespace(note_released=self.released.extend)

    def begin(self, transfer, address, hold, remote_page_ids, local_page_ids) -> None:
        if self.fails:
            raise self.fails

    def is_done(self, transfer) -> bool:
        if self.fails:
            raise self.fails
        return self.finished

    def cancel(self, transfer) -> None:
        self.cancelled += 1

    def retry_releases(self) -> None:
        pass


@pytest.fixture
def worker(scheduler, monkeypatch):
    monkeypatch.setattr("starling.features.replicas.worker_connector.get_tensor_model_parallel_rank", lambda: 0)
    made = StarConnector(scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config)
    made.connector_worker.reader = FakeReader()
    made.bind_connector_metadata(PageLoads([PageLoad("whole", [PageRead([ADDRESS], 5, [1, 2], [7, 8])])]))
    return made


def test_pages_of_engines_with_different_layouts_are_not_copied(scheduler, monkeypatch):
    """As with different values of VLLM_KV_CACHE_LAYOUT on two hosts."""
    monkeypatch.setattr("starling.features.replicas.worker_connector.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(
        "starling.features.replicas.worker_connector.PageReader",
        lambda name, caches, num_pages, layout, timeout: layout,
    )
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    layer = SimpleNamespace(get_attn_backend=lambda: backend)
    layouts = []
    for order in ("LBHNC", "LBNHC"):
        given = copy.copy(scheduler.vllm_config)
        given.cache_config = copy.copy(given.cache_config)
        given.cache_config.kv_cache_layout = order
        given.compilation_config = SimpleNamespace(static_forward_context={"layer": layer})
        connector = WorkerConnector(given, PAGE_SIZE, 40)
        connector.register_kv_caches({"layer": torch.zeros(40, 2)})
        layouts.append(connector.reader)
    assert layout_mismatch(layouts[0], layouts[0]) is None
    assert "LBHNC' here, 'FLASH_ATTN/any/auto/LBNHC' there" in layout_mismatch(*layouts)


def test_a_worker_reports_when_pages_have_arrived(worker):
    worker.start_load_kv(SimpleNamespace())
    assert worker.get_finished(set()) == (None, None)
    worker.connector_worker.reader.finished = True
    assert worker.get_finished(set()) == (None, {"whole"})
    assert worker.get_finished(set()) == (None, None)
    assert worker.get_block_ids_with_load_errors() == set()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_worker_reports_failed_pages_and_closes_the_connection(worker, at_once):
    if at_once:
        worker.connector_worker.reader.fails = TransferError("failed")
    worker.start_load_kv(SimpleNamespace())
    worker.connector_worker.reader.fails = TransferError("failed")
    assert worker.get_finished(set()) == (None, {"whole"})
    assert worker.get_block_ids_with_load_errors() == {7, 8}
    assert worker.connector_worker.reader.cancelled == 1
    assert (worker.get_finished(set()), worker.get_block_ids_with_load_errors()) == ((None, None), set())


def test_a_worker_whose_rank_the_source_does_not_have_reports_failed_pages(worker):
    """As with a peer that names fewer ranks than its state did: the load fails, and the worker goes on."""
    worker.connector_worker.rank = 1
    worker.start_load_kv(SimpleNamespace())
    assert worker.get_finished(set()) == (None, {"whole"})
    assert worker.get_block_ids_with_load_errors() == {7, 8}


def test_readers_learn_of_released_pages_with_the_step_that_may_write_to_them(scheduler, worker):
    for name in ("first", "second"):
        scheduler.add_request(part(name, 128, 256))
        run_to_end(scheduler)
    scheduler.connector.release(["second", "second", "unknown"])
    scheduler.add_request(make_request("other", None))
    step = scheduler.schedule()
    assert step.total_num_scheduled_tokens
    worker.bind_connector_metadata(step.kv_connector_metadata)
    assert worker.connector_worker.reader.released == [2]
    worker.start_load_kv(SimpleNamespace())
    assert worker.connector_worker.reader.released == [2]
    assert scheduler.schedule().kv_connector_metadata.released == []


def test_the_connector_does_not_support_sleep_mode():
    assert not StarConnector.supports_sleep_mode(KVTransferConfig(kv_connector="StarConnector", kv_role="kv_both"))


@pytest.mark.skipif(not hasattr(StarConnector.__base__, "kv_cache_access"), reason="vLLM asks since 0.34")
def test_a_gpu_s_pages_can_be_registered_and_mapped():
    """Else the KV cache of a GPU consists of pieces of memory, which NIXL can't register as one region."""
    from vllm.config.kv_transfer import KVCacheAccess

    transfer = KVTransferConfig(
        kv_connector="StarConnector",
        kv_connector_module_path=StarConnector.__module__,
        kv_role="kv_both",
        kv_buffer_device="cuda",
    )
    assert transfer.kv_cache_access() == KVCacheAccess.REGISTERS | KVCacheAccess.EXPORTS_FABRIC
    assert transfer.registers_kv_cache_memory()


@pytest.mark.parametrize("cached", [300, 0], ids=["found all pages cached", "lost its start"])
def test_a_request_that_has_begun_without_fetching_fetches_nothing_after_a_preemption(scheduler, cached):
    """The other replicas have released their pages by then, and use them for other prompts."""
    if cached:
        scheduler.add_request(make_request("before", PLAN, cached))
        run_to_end(scheduler)
    mine = whole("mine", 128, [1, 2, 3, 4])
    scheduler.add_request(mine)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens["mine"]
    assert not output.kv_connector_metadata.loads
    scheduler.update_from_output(output, answer(output, {"mine": []}))
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert mine.num_preemptions == 1
    assert scheduler.connector.get_num_new_matched_tokens(mine, 192) == (0, False)
