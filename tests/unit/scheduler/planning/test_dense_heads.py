"""Plans in which some KV heads see everything: the option, what excludes it, page keys and keys attended."""

from __future__ import annotations

import json

import msgspec
import pytest

from starling.config.head_scores import HeadScores, ScoresError, read_scores
from starling.config.parsing import OptionError
from starling.config.star import parse_options
from starling.scheduler.cache_keys import independent_plan, star_page_key
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import EngineFacts, KnownSegments, PromptFacts, ReplicaSet
from starling.scheduler.planning.plan import DenseHeads, StarPlan, dense_keys, keys_attended, summary
from starling.scheduler.planning.request_metadata import RequestMetadata
from tests.unit.plans import make_plan
from tests.unit.scheduler.test_cache_keys import fake_request

SCORES = HeadScores(scores=((0.1, 0.5), (0.5, -0.2), (), (0.3, 0.3)))
STAR = {"star": "on", "star_block_size": 64}


def plan_of(request: dict, defaults: dict | None = None, heads: HeadScores | None = SCORES, **engine) -> StarPlan:
    plan = make_plan(1000, STAR | (defaults or {}), request, 16, find_heads=lambda: heads, **engine)
    assert plan is not None
    return plan


def refused(request: dict, defaults: dict | None = None, **engine) -> str:
    with pytest.raises(OptionError) as error:
        plan_of(request, defaults, **engine)
    return str(error.value)


def test_heads_are_ordered_by_score_then_layer_then_head():
    assert SCORES.order == ((0, 1), (1, 0), (3, 0), (3, 1), (0, 0), (1, 1))
    assert SCORES.ranks == ((4, 0), (1, 5), (), (2, 3))
    assert SCORES.num_heads == 6
    assert [SCORES.count(share) for share in (0, 0.001, 0.25, 0.5, 1)] == [0, 1, 2, 3, 6]


def test_digests_say_which_heads_are_dense_in_whatever_order():
    other = HeadScores(scores=((0.1, 0.6), (0.7, -0.2), (), (0.3, 0.3)))
    assert other.digest(1) != SCORES.digest(1)
    assert other.digest(2) == SCORES.digest(2)
    assert len({SCORES.digest(count) for count in range(7)}) == 7


@pytest.mark.parametrize("value", [0.5, "0.5", "50%", " .5 "])
def test_a_share_is_taken_as_people_type_it(value):
    assert plan_of({"star_dense_heads": value}).dense_heads == DenseHeads(3, 6, SCORES.digest(3))


@pytest.mark.parametrize("value", [-0.1, 1.01, "110%", "a tenth", float("nan"), True, [0.1]])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(OptionError, match=r"star_dense_heads=.* it must be a share of the KV heads, 0 to 1"):
        parse_options({"star_dense_heads": value})


def test_by_default_a_tenth_is_dense_where_scores_are_known_and_blocks_have_an_overlap():
    assert (
        plan_of({}).dense_heads == plan_of({"star_dense_heads": 0.1}).dense_heads == DenseHeads(1, 6, SCORES.digest(1))
    )
    assert plan_of({"star_overlap_size": 32}).dense_heads is not None
    assert plan_of({}, heads=None).dense_heads is None
    assert plan_of({}, find_heads_refusals=lambda: ("a reason",)).dense_heads is None
    assert plan_of({"star_overlap_size": 0}).dense_heads is None
    assert plan_of({"star_anchor_size": 64}).dense_heads is None
    assert plan_of({}, replicas=ReplicaSet(2)).dense_heads is None
    assert decide_with_documents({"star_segments": "auto"}, {}).plan.dense_heads is None


def test_the_options_say_which_share_is_dense():
    assert plan_of({"star_dense_heads": 0}).dense_heads is None
    assert plan_of({}, {"star_dense_heads": 0}).dense_heads is None
    assert plan_of({"star_dense_heads": 0}, {"star_dense_heads": 0.5}).dense_heads is None
    assert plan_of({}, {"star_dense_heads": 0.5}).dense_heads == DenseHeads(3, 6, SCORES.digest(3))


def test_a_model_without_scores_or_an_engine_that_cannot_refuse_dense_heads():
    message = refused({"star_dense_heads": 0.5}, heads=None)
    assert "the scores of this model's KV heads are not known. Allowed: 0, or a server with --star-heads" in message
    message = refused({"star_dense_heads": 0.5}, find_heads_refusals=lambda: ("a reason",))
    assert message == "star_dense_heads=0.5 is refused: a reason. Allowed: 0."
    assert plan_of({"star_dense_heads": 0}, heads=None).dense_heads is None


def test_dense_heads_make_blocks_depend_on_one_another():
    replicas = ReplicaSet(2)
    message = refused({"star_dense_heads": 0.5, "star_overlap_size": 0, "star_replicas": 2}, replicas=replicas)
    assert "with star_dense_heads=0.5 each block needs all blocks before it" in message
    assert "and star_dense_heads=0" in message
    assert "each block needs" in refused(
        {"star_dense_heads": 0.5, "star_overlap_size": 0, "star_shards": "on"}, replicas=replicas
    )
    assert plan_of({"star_dense_heads": 0.5}, replicas=replicas).overlap_size > 0, "no replica needs independent blocks"
    plan = plan_of({"star_dense_heads": 0.5, "star_overlap_size": 0}, replicas=replicas)
    assert plan.replicas == 1
    assert plan_of({"star_overlap_size": 0}, replicas=replicas).replicas == 2
    independent = StarPlan(64, 64, 0, 500, 1000)
    assert not plan.is_independent
    assert independent.is_independent
    assert independent_plan(fake_request(list(range(1000)), independent)) is not None
    assert independent_plan(fake_request(list(range(1000)), plan)) is None


def decide_with_documents(request: dict, defaults: dict):
    prompt = PromptFacts(1000, list(range(1000)), KnownSegments("messages", (100, 400, 800)))
    engine = EngineFacts(16, find_heads=lambda: SCORES)
    return decide(parse_options(STAR | defaults), parse_options(request), prompt, engine)


def test_documents_have_no_dense_heads():
    with pytest.raises(OptionError, match=r"star_dense_heads=0.5 is refused: no head of a document sees the ones"):
        decide_with_documents({"star_segments": "auto", "star_dense_heads": 0.5}, {})
    decision = decide_with_documents({"star_dense_heads": 0.5}, {"star_segments": "auto"})
    assert not decision.plan.documents
    assert decision.plan.dense_heads is not None
    assert decision.why == "no documents: star_dense_heads=0.5 has heads that see every block before"
    decision = decide_with_documents({"star_segments": "auto"}, {"star_dense_heads": 0.5})
    assert decision.plan.documents
    assert decision.plan.dense_heads is None


def test_plans_with_dense_heads_travel():
    plan = plan_of({"star_dense_heads": 0.5})
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(RequestMetadata(plan).to_wire()))
    assert RequestMetadata.from_wire(wire).plan == plan


def test_page_keys_say_which_heads_are_dense_except_in_block_0_which_is_dense():
    some, others, none = (
        StarPlan(64, 16, 48, 500, 1000, dense_heads=heads)
        for heads in (DenseHeads(3, 6, "some"), DenseHeads(3, 6, "others"), None)
    )
    for start in range(0, 64, 16):
        assert star_page_key(some, start, start + 16) is None
    for start in (64, 480, 496, 900):
        assert len({star_page_key(plan, start, start + 16) for plan in (some, others, none)}) == 3


def test_keys_attended_are_a_mean_over_the_heads():
    star, half, everything = (
        keys_attended(plan_of({"star_dense_heads": share, "star_query_tokens": 100})) for share in (0, 0.5, 1)
    )
    assert everything == dense_keys(1000)
    assert half == pytest.approx((star + everything) / 2, abs=1)
    assert star < half
    assert summary(plan_of({"star_dense_heads": 0.4}))["dense_heads"] == 0.3333
    assert summary(plan_of({"star_dense_heads": 0}))["dense_heads"] == 0.0


def test_files_of_scores(tmp_path):
    ours, lines = tmp_path / "ours.json", tmp_path / "full_attention_heads.tsv"
    ours.write_text(SCORES.model_dump_json())
    lines.write_text("0.1\t0.5\n0.5\t-0.2\n")
    assert read_scores(str(ours)) == SCORES
    assert read_scores(str(lines)).scores == ((0.1, 0.5), (0.5, -0.2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read"),
        ("", "scores: Tuple should have at least 1 item"),
        ("{", "Invalid JSON"),
        (json.dumps({"scores": [[0.1, "x"]]}), r"scores\.0\.1"),
        (json.dumps({"scores": [[0.1]], "score": 1}), "score: Extra inputs"),
        ("0.1 nan", r"scores\.0\.1: .*finite"),
        ("a b", "neither JSON nor lines of numbers"),
    ],
)
def test_a_file_without_scores_is_refused(tmp_path, content, message):
    path = tmp_path / "scores"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ScoresError, match=message):
        read_scores(str(path))
