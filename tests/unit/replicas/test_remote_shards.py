"""A prompt whose KV stays on other replicas, on a real scheduler without a model: pages held, lost, and released."""

from __future__ import annotations

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from starling.features.fairness.core import PrefillLimiter
from starling.features.replicas.connector_metadata import WorkerReport
from starling.features.replicas.core import SplitPrompts
from starling.features.replicas.replica_calls import replica_state
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import (
    LOST,
    SHARDS,
    PromptPart,
    RemoteShards,
    RequestMetadata,
    Shard,
    default_num_shards,
    metadata_of,
)
from tests.unit.replicas.test_connector import ADDRESS, connected_scheduler, free_pages, hasher
from tests.unit.scheduler.simulation import answer, make_request, run_to_end
from tests.unit.scheduler.test_star_scheduler import config  # noqa: F401

PLAN = StarPlan(64, 64, 0, 290, 400, 3, True)
"""5 star blocks, the last of 34 tokens: another replica holds its whole page, and 2 of its tokens are local."""

IDS = [index % 250 for index in range(400)]


@pytest.fixture
def scheduler(config):  # noqa: F811
    made = connected_scheduler(config, **{SHARDS: 3})
    metadata = RequestMetadata(part=PromptPart("mine", 0, 64))
    made.add_request(make_request("part", PLAN, 128, max_tokens=1, metadata=metadata))
    run_to_end(made)
    assert free_pages(made) == 39 - 4
    return made


def whole(name: str, ids=IDS, **more):
    shards = (Shard("b", 128, 96, [ADDRESS]), Shard("c", 224, 64, [ADDRESS]))
    metadata = RequestMetadata(remote=RemoteShards("mine", shards))
    return make_request(name, PLAN, ids, metadata=metadata, **more)


def test_remote_shards_come_back_from_the_wire(scheduler):
    remote = metadata_of(whole("any")).remote
    assert (remote.local_name, remote.span()) == ("mine", (128, 288))
    assert [(shard.name, shard.start, shard.num_tokens) for shard in remote.shards] == [("b", 128, 96), ("c", 224, 64)]
    assert metadata_of(whole("any")).part is None and metadata_of(make_request("dense", None)).remote is None


def test_remote_shards_take_no_page_and_no_request_finds_them(scheduler):
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    (new,) = step.scheduled_new_reqs
    assert new.num_computed_tokens == 288 and step.num_scheduled_tokens["whole"] == 100
    held = [page.block_id for page in scheduler.connector.held_pages("mine")]
    assert new.block_ids[0][:9] == held + [0] * 5 and all(new.block_ids[0][9:])
    assert free_pages(scheduler) == 39 - 4 - 4
    scheduler.update_from_output(step, answer(step, {"whole": []}))
    assert run_to_end(scheduler) == 12 + 2
    assert free_pages(scheduler) == 39 - 4
    scheduler.add_request(make_request("alone", PLAN, IDS))
    assert run_to_end(scheduler) >= 160 + 2, "the blocks that other replicas hold are computed"
    scheduler.connector.release(["mine"])
    assert free_pages(scheduler) == 39 and scheduler.reset_prefix_cache()


def test_a_second_request_finds_the_query_of_the_first(scheduler):
    for computed in (112 + 2, 16 + 2):  # the last token of 400 is in no whole page
        scheduler.add_request(whole("whole"))
        assert run_to_end(scheduler) == computed
    assert replica_state(scheduler, hasher(), IDS, PLAN, None).result()["cached"] == bytes([1, 1, 0, 0, 0])


def test_a_preempted_request_goes_on_from_the_held_pages(scheduler):
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    scheduler.update_from_output(step, answer(step, {"whole": []}))
    (request,) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    assert free_pages(scheduler) == 39 - 4 and scheduler.requests["whole"].num_computed_tokens == 0
    step = scheduler.schedule()
    resumed = [new.num_computed_tokens for new in step.scheduled_new_reqs]  # since vLLM 0.34 it goes out as new
    resumed += step.scheduled_cached_reqs.num_computed_tokens
    assert resumed == [384], "its own computed pages are cached too"
    scheduler.update_from_output(step, answer(step, {"whole": [7]}))
    assert run_to_end(scheduler) == 2


def lost(step, reasons):
    output = answer(step, {name: [7] for name in step.num_scheduled_tokens})
    output.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=WorkerReport(reasons))
    return output


def test_a_lost_request_ends_with_the_reason_and_its_pages_leave_the_cache(scheduler):
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    (outputs,) = scheduler.update_from_output(step, lost(step, {"whole": "no answer", "gone": "no answer"})).values()
    (output,) = outputs.outputs
    assert (output.request_id, output.new_token_ids, output.finish_reason) == ("whole", [], FinishReason.ERROR)
    assert output.kv_transfer_params == {LOST: "no answer"}
    assert free_pages(scheduler) == 39 - 4 and "whole" not in scheduler.requests
    assert "whole" in scheduler.schedule().finished_req_ids
    scheduler.add_request(whole("again"))
    assert run_to_end(scheduler) == 112 + 2
    scheduler.connector.release(["mine"])
    assert free_pages(scheduler) == 39 and scheduler.reset_prefix_cache()


def without_limiter(scheduler):
    scheduler.use_parts(part for part in scheduler.parts if not isinstance(part, PrefillLimiter))


def test_other_requests_of_the_step_go_on(scheduler):
    without_limiter(scheduler)  # the long prompt gets the rest of the step
    scheduler.add_request(make_request("dense", None, 40))
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"dense": 8, "whole": 92}, "the dense prompt hits the part's first page"
    (outputs,) = scheduler.update_from_output(step, lost(step, {"whole": "no answer"})).values()
    reasons = {output.request_id: output.finish_reason for output in outputs.outputs}
    assert reasons == {"dense": None, "whole": FinishReason.ERROR}


def test_a_request_that_found_pages_of_a_lost_one_in_the_same_step_is_lost_too(scheduler):
    without_limiter(scheduler)
    scheduler.add_request(whole("first", ids=IDS[:360]))
    scheduler.add_request(whole("second", ids=IDS[:360]))
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"first": 72, "second": 8}
    (outputs,) = scheduler.update_from_output(step, lost(step, {"first": "no answer"})).values()
    reasons = {output.request_id: output.kv_transfer_params[LOST] for output in outputs.outputs}
    assert reasons["first"] == "no answer" and "shares pages" in reasons["second"]
    scheduler.connector.release(["mine"])
    assert free_pages(scheduler) == 39


def test_output_is_bounded_by_the_memory_of_one_replica(scheduler):
    """39 pages of 32 tokens: a whole prompt leaves less room for output than one with remote shards."""
    scheduler.add_request(make_request("dense", None, 400, max_tokens=5000))
    assert scheduler.requests["dense"].max_tokens == 39 * 32 - 400
    scheduler.add_request(whole("whole", max_tokens=5000))
    assert scheduler.requests["whole"].max_tokens == 39 * 32 - 400 + 160
    scheduler.part(SplitPrompts).kv_is_divided = False
    scheduler.add_request(make_request("other", None, 400, max_tokens=5000))
    assert scheduler.requests["other"].max_tokens == 5000


def test_the_start_of_a_prompt_is_held_while_a_request_begins_with_it(scheduler):
    """Also where the release arrives before the abort of the request."""
    for name in ("one", "other"):
        scheduler.add_request(whole(name))
    step = scheduler.schedule()
    scheduler.connector.release(["mine"])
    scheduler.update_from_output(step, answer(step, {name: [] for name in step.num_scheduled_tokens}))
    scheduler.finish_requests("one", RequestStatus.FINISHED_ABORTED)
    assert scheduler.connector.held_pages("mine")
    run_to_end(scheduler)
    assert free_pages(scheduler) == 39
    side = scheduler.connector.connector_scheduler
    assert not side.holds and not side.num_users and not side.release_later


def test_a_shard_is_open_until_its_pages_are_released(scheduler):
    held = [page.block_id for page in scheduler.connector.held_pages("mine")]
    assert scheduler.connector.begin_shard("mine") == held
    assert scheduler.connector.opened_shards == {"mine"}
    with pytest.raises(ValueError, match="no pages are held as other"):
        scheduler.connector.begin_shard("other")
    scheduler.connector.release(["mine"])
    assert scheduler.connector.opened_shards == set()


def test_a_step_in_which_nothing_ran_loses_no_request(scheduler):
    step = scheduler.schedule()
    results = scheduler.update_from_output(step, ModelRunnerOutput([], {})).values()
    assert not any(outputs.outputs for outputs in results)


def test_the_default_number_of_shards(scheduler, config):  # noqa: F811
    assert default_num_shards(scheduler.vllm_config) == 3
    assert default_num_shards(config) == 1
