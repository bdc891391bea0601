"""The plan: options to numbers, and numbers to keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_backends.star.reference import star_mask
from scheduler.options import OptionError, StarOptions, flat_name, merge, parse_options
from scheduler.plan import PLAN_KEY, Fleet, StarPlan, check_sizes, make_plan, plan_of

PAGE = 16


def plan(num_prompt_tokens: int = 1000, defaults: dict | None = None, page: int = PAGE, **request) -> StarPlan | None:
    server = parse_options({"mode": "on", "block_size": 64} | (defaults or {}), flat=False)
    options = parse_options({flat_name(key): value for key, value in request.items()}, flat=True) if request else None
    return make_plan(num_prompt_tokens, server, options, page)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, StarPlan(64, 64, 0, 500, 1000)),  # query: the lesser of 512 and half the prompt
        ({"num_prompt_tokens": 5000}, StarPlan(64, 64, 0, 4488, 5000)),
        ({"num_prompt_tokens": 101}, StarPlan(64, 64, 0, 51, 101)),
        ({"num_prompt_tokens": 1}, StarPlan(64, 64, 0, 0, 1)),
        ({"query_tokens": 0}, StarPlan(64, 64, 0, 999, 1000)),  # the last prompt token is always global
        ({"query_tokens": 700}, StarPlan(64, 64, 0, 300, 1000)),
        ({"context_tokens": 333}, StarPlan(64, 64, 0, 333, 1000)),
        ({"context_tokens": 1000}, StarPlan(64, 64, 0, 999, 1000)),
        ({"anchor_size": 32, "overlap_size": 16}, StarPlan(64, 32, 16, 500, 1000)),
        ({"anchor_size": 0}, StarPlan(64, 0, 0, 500, 1000)),
        ({"num_blocks": 4}, StarPlan(256, 256, 0, 500, 1000)),  # 250, rounded up to a page
        ({"num_blocks": 3000}, StarPlan(16, 16, 0, 500, 1000)),
        ({"defaults": {"block_size": 0, "num_blocks": 2}}, StarPlan(512, 512, 0, 500, 1000)),
        (
            {"defaults": {"anchor_size": 64, "overlap_size": 64}, "block_size": 32},
            StarPlan(32, 32, 32, 500, 1000),
        ),
        (
            {"defaults": {"query_tokens": 900}},
            StarPlan(64, 64, 0, 500, 1000),
        ),  # a default never takes the prompt
        ({"defaults": {"query_tokens": 900}, "context_tokens": 200}, StarPlan(64, 64, 0, 200, 1000)),
        ({"defaults": {"context_tokens": 900}, "query_tokens": 10}, StarPlan(64, 64, 0, 990, 1000)),
        ({"defaults": {"context_tokens": 5000}}, StarPlan(64, 64, 0, 999, 1000)),
        ({"mode": "off"}, None),
        ({"mode": "auto", "min_tokens": 1001}, None),
        ({"mode": "auto", "min_tokens": 1000}, StarPlan(64, 64, 0, 500, 1000)),
        ({"defaults": {"mode": "off"}}, None),
        ({"defaults": {"mode": "off"}, "mode": "on"}, StarPlan(64, 64, 0, 500, 1000)),
        ({"defaults": {"mode": "off"}, "mode": "off", "block_size": 32}, None),
    ],
)
def test_options_become_numbers(kwargs, expected):
    assert plan(**kwargs) == expected


REFUSED = [
    ({"star_blocksize": 64}, "star_blocksize", "no such"),
    ({"star_plan": [64, 64, 0, 9, 10]}, "star_plan", "no such"),
    ({"star": 1}, "star", "one of off, on, auto"),
    ({"star": "yes"}, "star", "one of off, on, auto"),
    ({"star_block_size": "64"}, "star_block_size", "whole number"),
    ({"star_block_size": 64.0}, "star_block_size", "whole number"),
    ({"star_block_size": True}, "star_block_size", "whole number"),
    ({"star_block_size": [64]}, "star_block_size", "whole number"),
    ({"star_anchor_size": -16}, "star_anchor_size", "0 or more"),
    ({"star_block_size": 40}, "star_block_size", "KV page of 16"),
    ({"star_anchor_size": 8}, "star_anchor_size", "KV page of 16"),
    ({"star_overlap_size": 8}, "star_overlap_size", "KV page of 16"),
    ({"star_anchor_size": 80}, "star_anchor_size", "larger than the star block of 64"),
    ({"star_overlap_size": 80}, "star_overlap_size", "larger than the star block of 64"),
    ({"star_block_size": 32, "star_anchor_size": 64}, "star_anchor_size", "larger than the star block of 32"),
    ({"star_query_tokens": 1001}, "star_query_tokens", "only 1000 tokens"),
    ({"star_context_tokens": 1001}, "star_context_tokens", "only 1000 tokens"),
    ({"star_query_tokens": 5, "star_context_tokens": 5}, "star_context_tokens", "other end"),
    ({"star_block_size": 64, "star_num_blocks": 4}, "star_num_blocks", "already sets"),
    ({"star_block_size": 0}, "star_block_size", "star_num_blocks is 0 too"),
    ({"star_replicas": 0}, "star_replicas", "auto, or a whole number of replicas"),
    ({"star_replicas": "all"}, "star_replicas", "auto, or a whole number of replicas"),
    ({"star_replicas": True}, "star_replicas", "auto, or a whole number of replicas"),
    ({"star_replicas": 2}, "star_replicas", "this server has 1"),
    ({"star_shards": "auto"}, "star_shards", "off, on"),
    ({"star_shards": "on"}, "star_shards", "this server has one replica"),
]


@pytest.mark.parametrize(("request_options", "name", "reason"), REFUSED)
def test_bad_options_are_refused_by_name_value_reason_and_allowed_set(request_options, name, reason):
    server = parse_options({"mode": "on", "block_size": 64}, flat=False)
    with pytest.raises(OptionError) as refused:
        make_plan(1000, server, parse_options(request_options, flat=True), PAGE)
    message = str(refused.value)
    assert refused.value.name == name
    assert message.startswith(f"{name}={request_options[name]!r} is refused: ")
    assert reason in message
    assert "Allowed: " in message


SHIFTED = Fleet(2, "the model has KV shifting")


@pytest.mark.parametrize(
    ("options", "fleet", "replicas"),
    [
        ({}, Fleet(), 1),
        ({}, Fleet(2), 2),
        ({}, Fleet(64), 7),  # 8 blocks: with 7 of them each has the anchor and one block, or two blocks
        ({"replicas": "auto"}, Fleet(3), 3),
        ({"replicas": 1}, Fleet(2), 1),
        ({"replicas": 2}, Fleet(3), 2),
        ({"context_tokens": 128}, Fleet(2), 1),  # two blocks: the second replica would compute two as well
        ({"context_tokens": 64}, Fleet(2), 1),  # one block is dense
        ({}, SHIFTED, 1),
        ({"replicas": 1}, SHIFTED, 1),
        ({"overlap_size": 16}, Fleet(2), 1),
    ],
)
def test_a_plan_says_over_how_many_replicas_it_may_go(options, fleet, replicas):
    request = parse_options({flat_name(key): value for key, value in options.items()}, flat=True)
    made = make_plan(1000, parse_options({"mode": "on", "block_size": 64}, flat=False), request, PAGE, fleet)
    assert made is not None
    assert made.replicas == made.summary()["replicas"] == replicas


@pytest.mark.parametrize(
    ("options", "fleet", "message"),
    [
        ({"replicas": 3}, Fleet(2), "star_replicas=3 is refused: this server has 2 .*Allowed: auto, or 1 to 2"),
        ({"replicas": 2}, SHIFTED, "star_replicas=2 is refused: the model has KV shifting. Allowed: auto or 1"),
        ({"replicas": 2, "overlap_size": 16}, Fleet(2), "star_overlap_size=16 each block needs .*star_overlap_size=0"),
        ({"mode": "auto", "min_tokens": 5000, "replicas": 3}, Fleet(2), "star_replicas=3"),  # dense today, all the same
    ],
)
def test_replicas_that_can_not_be_had_are_refused(options, fleet, message):
    request = parse_options({flat_name(key): value for key, value in options.items()}, flat=True)
    with pytest.raises(OptionError, match=message):
        make_plan(1000, parse_options({"mode": "on", "block_size": 64}, flat=False), request, PAGE, fleet)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"block_size": 32}, "star_block_size"),  # star is off by default: a size alone would do nothing
        (
            {"mode": "auto", "min_tokens": 5000, "block_size": 40},
            "star_block_size",
        ),  # short today, refused all the same
    ],
)
def test_options_without_effect_are_refused(options, name):
    with pytest.raises(OptionError) as refused:
        plan(defaults={"mode": "off"}, **options)
    assert refused.value.name == name


def test_server_defaults_use_bare_names_in_messages():
    with pytest.raises(OptionError, match=r"^block_size='x' is refused"):
        parse_options({"block_size": "x"}, flat=False)


@pytest.mark.parametrize(
    "star",
    [{"block_size": 100}, {"block_size": 64, "anchor_size": 128}, {"block_size": 64, "overlap_size": 24}],
)
def test_server_defaults_are_held_against_the_page(star):
    with pytest.raises(OptionError, match="refused"):
        check_sizes(parse_options(star, flat=False), PAGE)


def test_defaults_suit_every_page_up_to_their_size():
    for page in (16, 32, 48, 64, 128, 256, 1024, 1600):
        check_sizes(StarOptions(), page)
        assert make_plan(20_000, StarOptions(mode="on"), None, page).block_size == -(-8192 // page) * page


def test_a_request_replaces_only_what_it_gives():
    server = parse_options({"mode": "auto", "block_size": 64, "query_tokens": 7}, flat=False)
    merged = merge(server, parse_options({"star_block_size": 128}, flat=True))
    assert (merged.mode, merged.block_size, merged.query_tokens) == ("auto", 128, 7)


def test_the_plan_travels_in_extra_args():
    star = StarPlan(64, 32, 16, 500, 1000)
    assert plan_of({PLAN_KEY: star.to_wire()}) == star
    assert plan_of({PLAN_KEY: StarPlan(64, 64, 0, 64, 100).to_wire()}) is None  # one block is dense
    assert plan_of({"other": 1}) is None
    assert plan_of(None) is None


@st.composite
def plans(draw) -> StarPlan:
    page = 4
    block_size = page * draw(st.integers(1, 8))
    sizes = st.integers(0, block_size // page).map(lambda pages: pages * page)
    num_prompt_tokens = draw(st.integers(1, 120))
    return StarPlan(
        block_size, draw(sizes), draw(sizes), draw(st.integers(0, num_prompt_tokens - 1)), num_prompt_tokens
    )


@given(plans(), st.data())
def test_pieces_cover_the_span_and_see_the_keys_of_the_mask(star, data):
    """Any span of a prompt: the pieces tile it, and each token's keys are its row of the explicit mask."""
    start = data.draw(st.integers(0, star.num_prompt_tokens - 1))
    end = data.draw(st.integers(start + 1, star.num_prompt_tokens))
    mask = star_mask(
        star.num_prompt_tokens,
        block_size=star.block_size,
        anchor_size=star.anchor_size,
        overlap_size=star.overlap_size,
        context_end=star.context_end,
    )
    position = start
    for piece_start, piece_end, keys in star.split(start, end):
        assert piece_start == position < piece_end
        assert all(first % 4 == 0 for first, _ in keys)
        for query in range(piece_start, piece_end):
            seen = [key for first, stop in keys for key in range(first, stop) if key <= query]
            assert seen == mask[query].nonzero()[:, 0].tolist()
        position = piece_end
    assert position == end


@given(plans())
def test_keys_attended_are_those_of_the_mask(star):
    mask = star_mask(
        star.num_prompt_tokens,
        block_size=star.block_size,
        anchor_size=star.anchor_size,
        overlap_size=star.overlap_size,
        context_end=star.context_end,
    )
    assert star.keys_attended() == int(mask.sum())
    assert star.dense_keys() == star.num_prompt_tokens * (star.num_prompt_tokens + 1) // 2


@pytest.mark.parametrize(
    ("server", "request_", "fleet", "shards"),
    [
        ({}, {}, Fleet(3), False),
        ({}, {"shards": "on"}, Fleet(3), True),
        ({"shards": "on"}, {}, Fleet(3), True),
        ({"shards": "on"}, {"shards": "off"}, Fleet(3), False),
        ({"shards": "on"}, {"replicas": 1}, Fleet(3), False),  # a default that has nothing to do
        ({"shards": "on"}, {"overlap_size": 16}, Fleet(3), False),
        ({}, {"shards": "on", "block_size": 512}, Fleet(3), False),  # two blocks gain nothing
    ],
)
def test_a_plan_says_whether_its_kv_stays_where_it_was_made(server, request_, fleet, shards):
    defaults = parse_options({"mode": "on", "block_size": 64} | server, flat=False)
    request = parse_options({flat_name(key): value for key, value in request_.items()}, flat=True)
    made = make_plan(1000, defaults, request, PAGE, fleet)
    assert made.shards == made.summary()["shards"] == shards
    assert StarPlan(*made.to_wire()) == made


@pytest.mark.parametrize(
    ("request_", "fleet", "reason"),
    [
        ({}, Fleet(1), "this server has one replica"),
        ({}, SHIFTED, "the model has KV shifting"),
        ({}, Fleet(2, None, "wired on CPU only"), "wired on CPU only"),
        ({"replicas": 1}, Fleet(2), "star_replicas=1 keeps the prompt on one replica"),
        ({"overlap_size": 16}, Fleet(2), "with star_overlap_size=16 each block needs the one before it"),
    ],
)
def test_shards_that_can_not_engage_are_refused(request_, fleet, reason):
    defaults = parse_options({"mode": "on", "block_size": 64}, flat=False)
    request = parse_options(
        {"star_shards": "on"} | {flat_name(key): value for key, value in request_.items()}, flat=True
    )
    with pytest.raises(OptionError, match=rf"star_shards='on' is refused: {reason}.* Allowed: off\."):
        make_plan(1000, defaults, request, PAGE, fleet)
