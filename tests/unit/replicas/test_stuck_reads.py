"""A failed transfer whose handle NIXL does not release: its pages are given to no request until it does.

On vLLM's real scheduler and pages, and on NIXL, of which the one call fails.
"""

from __future__ import annotations

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from starling.features.replicas.connector import StarConnector
from starling.features.replicas.connector_metadata import WorkerReport
from starling.features.replicas.core import SplitPrompts
from starling.features.replicas.page_transfer import PageReader
from starling.scheduler.planning.request_metadata import LOST, PageFetch, PageSource, RequestMetadata
from starling.scheduler.provenance import scheduler_metrics
from tests.unit.replicas.test_connector import (
    PLAN,
    config,  # noqa: F401
    connected_scheduler,
    free_pages,
    part,
)
from tests.unit.scheduler.simulation import make_request, run_to_end

PAGES = 40
SOURCE_PAGES = [21, 22, 30, 31, 32]
LAYOUT = {"dtype": "float32"}


class Replica:
    """A scheduler, and a worker that reads pages from another one.

    Attributes:
        releases: whether NIXL releases handles.
        stuck: the pages of the failed read.
    """

    def __init__(self, config, monkeypatch) -> None:  # noqa: F811
        monkeypatch.setattr("starling.features.replicas.worker_connector.get_tensor_model_parallel_rank", lambda: 0)
        self.scheduler = connected_scheduler(config)
        self.worker = StarConnector(
            self.scheduler.vllm_config, KVConnectorRole.WORKER, self.scheduler.kv_cache_config
        ).connector_worker
        ours, theirs = self.memory = [{"layer": torch.zeros(PAGES, 2, 16, 8)} for _ in range(2)]
        self.worker.reader = PageReader("stuck-ours", ours, PAGES, LAYOUT, 30.0)
        self.source = PageReader("stuck-theirs", theirs, PAGES, LAYOUT, 30.0)
        self.releases = False
        agent = self.worker.reader.agent
        release = agent.release_xfer_handle

        def release_xfer_handle(handle) -> None:
            if not self.releases:
                raise RuntimeError("NIXL_ERR_BACKEND")
            release(handle)

        monkeypatch.setattr(agent, "release_xfer_handle", release_xfer_handle)
        monkeypatch.setattr(agent, "check_xfer_state", lambda handle: "ERR")

    def begin_fetch(self) -> None:
        """Compute the own part, and begin to fetch the rest."""
        self.scheduler.add_request(part("mine", 0, 128))
        run_to_end(self.scheduler)
        self.scheduler.connector.release(["mine"])
        sources = (PageSource(128, SOURCE_PAGES, [self.source.address()], 1),)
        whole = make_request("whole", PLAN, 300, metadata=RequestMetadata(fetch=PageFetch(sources)))
        self.scheduler.add_request(whole)
        step = self.scheduler.schedule()
        self.worker.start_loads(step.kv_connector_metadata)
        self.stuck = step.kv_connector_metadata.loads[0].local_page_ids()
        assert len(self.stuck) == len(SOURCE_PAGES)
        self.scheduler.update_from_output(step, ModelRunnerOutput([], {}))

    def step_of_worker(self):
        """A step in which nothing is computed; the worker reports its transfers."""
        step = self.scheduler.schedule()
        assert not step.total_num_scheduled_tokens
        output = KVConnectorOutput(finished_recving=self.worker.take_finished())
        output.invalid_block_ids = self.worker.take_failed_page_ids()
        output.kv_connector_worker_meta = self.worker.take_report()
        return self.scheduler.update_from_output(step, ModelRunnerOutput([], {}, kv_connector_output=output))

    def held(self) -> set[int]:
        """The pages that requests hold now."""
        manager = self.scheduler.kv_cache_manager
        return {page for name in self.scheduler.requests for page in manager.get_block_ids(name)[0]}

    def fill(self) -> None:
        """Run prompts until each page of the pool has been used."""
        used = set()
        for number in range(8):
            request = make_request(f"fill {number}", None, [number * 31 % 250] * 30 * 32)
            self.scheduler.add_request(request)
            step = self.scheduler.schedule()
            used |= self.held()
            self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
            self.scheduler.update_from_output(step, ModelRunnerOutput([], {}))
        assert not used & self.stuck

    def close(self) -> None:
        self.releases = True
        self.worker.reader.retry_releases()
        self.worker.reader.close()
        self.source.close()


@pytest.fixture
def replica(config, monkeypatch):  # noqa: F811
    made = Replica(config, monkeypatch)
    yield made
    made.close()


def quarantined() -> float:
    return scheduler_metrics().quarantined_pages._value.get()


def test_the_request_gets_other_pages_and_nobody_gets_the_stuck_ones_until_they_are_free(replica):
    replica.begin_fetch()
    replica.step_of_worker()
    assert not replica.held() & replica.stuck
    assert quarantined() == len(replica.stuck)
    assert run_to_end(replica.scheduler) == 300 - 128 + 2, "what was not fetched is computed"
    assert free_pages(replica.scheduler) == 39 - len(replica.stuck)
    replica.fill()
    replica.step_of_worker()
    assert free_pages(replica.scheduler) == 39 - len(replica.stuck)
    replica.releases = True
    replica.step_of_worker()
    assert free_pages(replica.scheduler) == 39
    assert quarantined() == 0
    assert not replica.worker.reader.stuck
    assert replica.scheduler.reset_prefix_cache()


def test_the_pages_of_a_request_that_was_aborted_meanwhile_stay_out_of_the_pool_too(replica):
    replica.begin_fetch()
    replica.scheduler.finish_requests("whole", RequestStatus.FINISHED_ABORTED)
    replica.step_of_worker()
    assert not replica.scheduler.requests
    assert free_pages(replica.scheduler) == 39 - len(replica.stuck)
    replica.fill()
    replica.releases = True
    replica.step_of_worker()
    assert free_pages(replica.scheduler) == 39


def test_a_request_for_which_no_other_pages_are_free_ends_with_the_reason(replica):
    replica.begin_fetch()
    pool = replica.scheduler.view.pool
    taken = pool.block_pool.get_new_blocks(pool.num_free_pages - 3)
    outputs = replica.step_of_worker()[0].outputs
    assert [output.kv_transfer_params for output in outputs] == [
        {LOST: "its pages could not be fetched, and no other ones are free"}
    ]
    assert not replica.scheduler.requests
    pool.release(taken)
    assert free_pages(replica.scheduler) == 39 - len(replica.stuck)
    replica.releases = True
    replica.step_of_worker()
    assert free_pages(replica.scheduler) == 39


def test_a_page_is_free_once_the_transfers_of_all_ranks_have_ended(replica):
    quarantine = replica.scheduler.part(SplitPrompts).quarantine
    both = WorkerReport(stuck_pages=[5, 6]).aggregate(WorkerReport(stuck_pages=[5]))
    quarantine.add(both.stuck_pages)
    assert free_pages(replica.scheduler) == 39 - 2
    quarantine.free([5, 6])
    assert free_pages(replica.scheduler) == 39 - 1
    quarantine.free([5])
    assert free_pages(replica.scheduler) == 39


def test_a_request_computes_pages_that_their_source_released_before_they_had_arrived(replica, monkeypatch):
    """This process may have stood still between the front's request and the read."""
    monkeypatch.undo()
    replica.source.holds.note_released([1])
    replica.begin_fetch()
    while not (finished := replica.worker.take_finished()):
        pass
    assert finished == {"whole"}
    assert replica.worker.take_failed_page_ids() == replica.stuck


def test_a_wave_that_ended_after_the_timeout_does_not_count(replica, monkeypatch):
    """The process has hung: the source may have released the pages meanwhile."""
    replica.releases = True
    replica.begin_fetch()
    monkeypatch.setattr(replica.worker.reader.agent, "check_xfer_state", lambda handle: "DONE")
    monkeypatch.setattr(replica.worker.reader, "timeout", -1.0)
    assert replica.worker.take_finished() == {"whole"}
    assert replica.worker.take_failed_page_ids() == replica.stuck
