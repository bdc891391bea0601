"""A prompt whose KV other replicas keep, on a real scheduler without a model: what is claimed, lost, and let go."""

from __future__ import annotations

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from engine_ext.shard_client import LostRequests
from scheduler.plan import StarPlan
from scheduler.replica_state import replica_state
from scheduler.share import LOST, SHARDS, SHARE_KEY, Attend, Part, Shard, Share, attend_of, default_shards, part_of
from tests.unit.simulation import answer, make_request, run_to_end
from tests.unit.test_star_connector import ADDRESS, connected_scheduler, free_pages, hasher
from tests.unit.test_star_scheduler import config  # noqa: F401

PLAN = StarPlan(64, 64, 0, 290, 400, 3, True)
"""5 blocks, the last of 34 tokens: its whole page is elsewhere, 2 tokens of it are here."""

IDS = [index % 250 for index in range(400)]


@pytest.fixture
def scheduler(config):  # noqa: F811
    made = connected_scheduler(config, **{SHARDS: 3})
    share = Share(PLAN.to_wire(), Part("mine", 0, 64))
    made.add_request(make_request("part", PLAN, 128, max_tokens=1, extra={SHARE_KEY: share.to_wire()}))
    run_to_end(made)
    assert free_pages(made) == 39 - 4
    return made


def whole(name: str, ids=IDS, **more):
    shards = (Shard("b", 128, 96, [ADDRESS]), Shard("c", 224, 64, [ADDRESS]))
    return make_request(name, PLAN, ids, extra={SHARE_KEY: Share(None, Attend("mine", shards)).to_wire()}, **more)


def test_where_the_rest_is_comes_back_from_the_wire(scheduler):
    attend = attend_of(whole("any"))
    assert (attend.own, attend.span()) == ("mine", (128, 288))
    assert [(shard.name, shard.start, shard.tokens) for shard in attend.shards] == [("b", 128, 96), ("c", 224, 64)]
    assert part_of(whole("any")) is None and attend_of(make_request("dense", None)) is None


def test_what_others_keep_takes_no_page_and_nobody_finds_it(scheduler):
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    (new,) = step.scheduled_new_reqs
    assert new.num_computed_tokens == 288 and step.num_scheduled_tokens["whole"] == 100
    held = [block.block_id for block in scheduler.connector.held["mine"]]
    assert new.block_ids[0][:9] == held + [0] * 5 and all(new.block_ids[0][9:])
    assert free_pages(scheduler) == 39 - 4 - 4
    scheduler.update_from_output(step, answer(step, {"whole": []}))
    assert run_to_end(scheduler) == 12 + 2
    assert free_pages(scheduler) == 39 - 4
    scheduler.add_request(make_request("alone", PLAN, IDS))
    assert run_to_end(scheduler) >= 160 + 2, "the blocks that are elsewhere are computed"
    scheduler.connector.let_go(["mine"])
    assert free_pages(scheduler) == 39 and scheduler.reset_prefix_cache()


def test_a_second_one_finds_the_query_of_the_first(scheduler):
    for computed in (112 + 2, 16 + 2):  # the last token of 400 is in no whole page
        scheduler.add_request(whole("whole"))
        assert run_to_end(scheduler) == computed
    assert replica_state(scheduler, hasher(), IDS, PLAN, None)["cached"] == [0, 1]


def test_a_preempted_one_goes_on_from_what_is_held(scheduler):
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    scheduler.update_from_output(step, answer(step, {"whole": []}))
    (request,) = scheduler.running
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    assert free_pages(scheduler) == 39 - 4 and scheduler.requests["whole"].num_computed_tokens == 0
    step = scheduler.schedule()
    assert step.scheduled_cached_reqs.num_computed_tokens == [384], "and so do the pages that it has computed itself"
    scheduler.update_from_output(step, answer(step, {"whole": [7]}))
    assert run_to_end(scheduler) == 2


def lost(step, reasons):
    output = answer(step, {name: [7] for name in step.num_scheduled_tokens})
    output.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=LostRequests(reasons))
    return output


def test_a_lost_one_ends_with_the_reason_and_what_it_computed_is_forgotten(scheduler):
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    (outputs,) = scheduler.update_from_output(step, lost(step, {"whole": "no answer", "gone": "no answer"})).values()
    (told,) = outputs.outputs
    assert (told.request_id, told.new_token_ids, told.finish_reason) == ("whole", [], FinishReason.ERROR)
    assert told.kv_transfer_params == {LOST: "no answer"}
    assert free_pages(scheduler) == 39 - 4 and "whole" not in scheduler.requests
    assert "whole" in scheduler.schedule().finished_req_ids
    scheduler.add_request(whole("again"))
    assert run_to_end(scheduler) == 112 + 2
    scheduler.connector.let_go(["mine"])
    assert free_pages(scheduler) == 39 and scheduler.reset_prefix_cache()


def test_others_of_the_step_go_on(scheduler):
    scheduler.sharing = None  # the long prompt gets all that is left
    scheduler.add_request(make_request("dense", None, 40))
    scheduler.add_request(whole("whole"))
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"dense": 8, "whole": 92}, "the dense one's first page is that of the part"
    (outputs,) = scheduler.update_from_output(step, lost(step, {"whole": "no answer"})).values()
    told = {output.request_id: output.finish_reason for output in outputs.outputs}
    assert told == {"dense": None, "whole": FinishReason.ERROR}


def test_one_that_found_a_lost_ones_pages_in_the_same_step_is_lost_too(scheduler):
    scheduler.sharing = None
    scheduler.add_request(whole("first", ids=IDS[:360]))
    scheduler.add_request(whole("second", ids=IDS[:360]))
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"first": 72, "second": 8}
    (outputs,) = scheduler.update_from_output(step, lost(step, {"first": "no answer"})).values()
    told = {output.request_id: output.kv_transfer_params[LOST] for output in outputs.outputs}
    assert told["first"] == "no answer" and "shares pages" in told["second"]
    scheduler.connector.let_go(["mine"])
    assert free_pages(scheduler) == 39


def test_output_ends_where_one_replicas_memory_does(scheduler):
    """39 pages of 32: a whole prompt leaves room for the rest, one that is mostly elsewhere for more."""
    scheduler.add_request(make_request("dense", None, 400, max_tokens=5000))
    assert scheduler.requests["dense"].max_tokens == 39 * 32 - 400
    scheduler.add_request(whole("whole", max_tokens=5000))
    assert scheduler.requests["whole"].max_tokens == 39 * 32 - 400 + 160
    scheduler.shared_out = False
    scheduler.add_request(make_request("other", None, 400, max_tokens=5000))
    assert scheduler.requests["other"].max_tokens == 5000


def test_the_start_of_a_prompt_stays_while_a_request_begins_with_it(scheduler):
    """Also where it is let go before the request's abort has come."""
    for name in ("one", "other"):
        scheduler.add_request(whole(name))
    step = scheduler.schedule()
    scheduler.connector.let_go(["mine"])
    scheduler.update_from_output(step, answer(step, {name: [] for name in step.num_scheduled_tokens}))
    scheduler.finish_requests("one", RequestStatus.FINISHED_ABORTED)
    assert "mine" in scheduler.connector.held
    run_to_end(scheduler)
    assert free_pages(scheduler) == 39
    assert not scheduler.connector.held and not scheduler.connector.users and not scheduler.connector.leaving


def test_pages_are_opened_before_they_are_asked_for_and_forgotten_when_let_go(scheduler):
    held = [block.block_id for block in scheduler.connector.held["mine"]]
    assert scheduler.connector.begin_shard("mine") == held
    assert scheduler.connector.opened == {"mine"}
    with pytest.raises(ValueError, match="no pages are held as other"):
        scheduler.connector.begin_shard("other")
    scheduler.connector.let_go(["mine"])
    assert scheduler.connector.opened == set()


def test_a_step_in_which_nothing_ran_loses_nobody(scheduler):
    step = scheduler.schedule()
    told = scheduler.update_from_output(step, ModelRunnerOutput([], {})).values()
    assert not any(outputs.outputs for outputs in told)


def test_over_how_many_replicas_by_default(scheduler, config):  # noqa: F811
    assert default_shards(scheduler.vllm_config) == 3
    assert default_shards(config) == 1
