"""Where the blocks of a prompt are, and which options and prompts are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.scheduler.star.block_layout import check_block_positions, cut, lay_out, plan_blocks
from starling.scheduler.star.client_tokens import client_indexes
from starling.scheduler.star.counts import num_client_tokens
from starling.scheduler.star.make_plan import ONE_REPLICA, ReplicaSet
from starling.scheduler.star.options import parse_options
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.segments import TokenLimits, positions_of

MARK, PAGE_SIZE, BLOCK = 0, 4, 8
ON = {"star": "on", "star_positions": "block", "star_segment_token": MARK, "star_query_tokens": 3}
LIMITS = TokenLimits(max_prompt_tokens=10_000, vocabulary_size=320, white_space=lambda: None)


def prompt(*sizes: int, head: int = 0, query: int = 3) -> list[int]:
    """A head, segments with these numbers of tokens, their marks included, and a query."""
    context = [token for size in sizes for token in [MARK] + [7] * (size - 1)]
    return [88] * head + context + [99] * query


def plan(
    ids: list[int],
    options: dict | None = None,
    defaults: dict | None = None,
    limits: TokenLimits = LIMITS,
    replicas: ReplicaSet = ONE_REPLICA,
):
    """The plan of a request with these options, over the server's defaults under their bare names."""
    request = parse_options(options, flat=True) if options else None
    return plan_blocks(ids, parse_options(defaults or {}, flat=False), request, PAGE_SIZE, limits, replicas)


def client_blocks(ids: list[int], options: dict) -> list[tuple[int, int]]:
    """(start, stop) of the plan's blocks in the client's prompt."""
    made = plan(ids, options)
    indexes = client_indexes(made).tolist()
    return [
        (start if start == stop == 0 else indexes.index(start), len([one for one in indexes if one < stop]))
        for start, stop in made.documents
    ]


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        ([1, 2, 0, 3, 0, 4], [(0, 2), (2, 4), (4, 6)]),
        ([0, 1, 0, 2], [(0, 2), (2, 4)]),  # a mark at 0: there is no head
        ([5, 0, 1, 0, 2], [(0, 1), (1, 3), (3, 5)]),  # a tokenizer may put one token before the prompt
        ([0, 0, 0], [(0, 1), (1, 2), (2, 3)]),
        ([1, 2, 3], [(0, 3)]),
        ([1] * 9 + [0], [(0, 4), (4, 8), (8, 9), (9, 10)]),  # a head longer than B
        ([0] + [1] * 9, [(0, 4), (4, 8), (8, 10)]),  # a segment longer than B
        ([1, 0, 2, 2, 2, 0, 3], [(0, 1), (1, 5), (5, 7)]),  # a segment of B tokens
        ([0], [(0, 1)]),
        ([], []),
    ],
)
def test_a_context_is_cut_at_marks_and_after_b_tokens(ids, pieces):
    assert cut(positions_of(0, ids, len(ids)), len(ids), 4) == pieces
    assert cut(positions_of(0, [*ids, 0, 0], len(ids)), len(ids), 4) == pieces, "a mark in the query is none"


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(1, 9))
def test_pieces_follow_one_another_and_each_mark_starts_one(ids, context_end, block_size):
    context_end = min(context_end, len(ids))
    pieces = cut(positions_of(MARK, ids, context_end), context_end, block_size)
    assert [0, *(stop for _, stop in pieces)] == [*(start for start, _ in pieces), context_end]
    assert all(start < stop <= start + block_size for start, stop in pieces)
    starts = {start for start, _ in pieces}
    marks = {index for index in range(context_end) if ids[index] == MARK}
    assert marks <= starts
    later = starts - marks - {0}
    assert all(start - block_size in starts for start in later), "where B tokens are before it"


@given(st.lists(st.integers(1, 11), min_size=1, max_size=6), st.integers(0, 9))
def test_blocks_start_at_pages_and_take_as_few_as_they_can(lengths, head):
    pieces, stop = [(0, head)], head
    for length in lengths:
        pieces, stop = [*pieces, (stop, stop + length)], stop + length
    blocks, end = lay_out(pieces, PAGE_SIZE)
    for (start, stop), (first, last), following in zip(blocks, pieces, [*blocks[1:], (end, end)], strict=True):
        assert start % PAGE_SIZE == 0 and stop - start == last - first
        assert 0 <= following[0] - stop < PAGE_SIZE


def test_the_plan_has_the_segments_of_the_prompt():
    made = plan(prompt(5, 1, 8, head=9), ON | {"star_block_size": 12})
    assert made.documents == ((0, 9), (12, 17), (20, 21), (24, 32))
    assert (made.block_size, made.anchor_size, made.overlap_size) == (12, 8, 0)
    assert (made.context_end, made.num_prompt_tokens, num_client_tokens(made)) == (32, 35, 26)
    assert (made.replicas, made.shards, made.padding_token) == (1, False, MARK)


@pytest.mark.parametrize(
    ("head", "options", "anchor_size"),
    [
        (0, {}, 0),
        (3, {}, 0),
        (9, {}, 8),
        (9, {"star_anchor_size": 4}, 4),
        (9, {"star_anchor_size": 0}, 0),
        (7, {"star_anchor_size": 8}, 4),
        (30, {"star_block_size": 16}, 16),  # a head longer than B is cut there
    ],
)
def test_the_anchor_is_the_whole_pages_of_the_head(head, options, anchor_size):
    assert plan(prompt(5, 5, head=head), ON | options).anchor_size == anchor_size


@pytest.mark.parametrize(
    ("ids", "options", "blocks"),
    [
        (prompt(5, 5), {}, [(0, 5), (5, 10)]),
        (prompt(20, 5), {"star_block_size": BLOCK}, [(0, 8), (8, 16), (16, 20), (20, 25)]),
        (prompt(5, head=1), {}, [(0, 1), (1, 6)]),
        (prompt(5, 5), {"star_query_tokens": 8}, None),  # the second mark is in the query: one block
        (prompt(5, 5), {"star_query_tokens": 0}, [(0, 5), (5, 12)]),
        (prompt(5, 5, query=1), {"star_query_tokens": None, "star_context_tokens": 10}, [(0, 5), (5, 10)]),
        (prompt(5, 5), {"star_overlap_size": 0, "star_shards": "off"}, [(0, 5), (5, 10)]),
        (prompt(5), {}, None),  # one block, which is dense
        (prompt(1, 1), {}, [(0, 1), (1, 2)]),
    ],
)
def test_a_prompt_has_a_plan_where_it_has_two_blocks(ids, options, blocks):
    given = {key: value for key, value in (ON | options).items() if value is not None}
    if blocks is None:
        assert plan(ids, given) is None
    else:
        assert client_blocks(ids, given) == blocks


def test_a_prompt_without_marks_is_cut_after_b_tokens_if_the_mark_is_a_default():
    defaults = {"mode": "on", "positions": "block", "segment_token": 5, "query_tokens": 3}
    assert plan(prompt(8192), None, defaults) is None
    assert plan(prompt(8193), None, defaults).documents == ((0, 8192), (8192, 8193))
    assert len(plan(prompt(20), None, defaults | {"block_size": BLOCK}).starts) == 3
    assert plan([88], None, defaults) is None


def test_a_prompt_without_a_segment_token_is_cut_after_b_tokens():
    made = plan(prompt(20, 5), {"star": "on", "star_positions": "block", "star_block_size": 8, "star_query_tokens": 3})
    assert made.documents == ((0, 8), (8, 16), (16, 24), (24, 25))
    assert (made.anchor_size, made.context_end) == (8, 28)


@pytest.mark.parametrize(
    ("options", "token"),
    [
        ({}, MARK),
        ({"star_padding_token": 50}, 50),
        ({"star_segment_token": None}, 88),
        ({"star_segment_token": None, "defaults": 5}, 88),  # a default that the prompt does not have
    ],
)
def test_padding_is_a_token_that_the_prompt_has(options, token):
    """So no penalty of sampling counts another one; unless an option names it."""
    given = {key: value for key, value in (ON | options).items() if value is not None and key != "defaults"}
    made = plan(prompt(20, 5, head=1), given | {"star_block_size": 8}, {"segment_token": options.get("defaults")})
    assert made.padding_token == token
    assert made.num_prompt_tokens > num_client_tokens(made)


def test_a_requests_options_replace_the_servers():
    defaults = {"mode": "on", "positions": "block", "segment_token": MARK, "query_tokens": 3, "block_size": BLOCK}
    ids = prompt(20, 5)
    assert len(plan(ids, None, defaults).starts) == 4
    assert len(plan(ids, {"star_block_size": 12}, defaults).starts) == 3
    assert plan(ids, {"star": "off"}, defaults) is None
    assert plan(ids, {"star_segment_token": 99, "star_query_tokens": 1}, defaults).documents[-2:] == (
        (28, 29),
        (32, 33),
    )
    assert plan(ids, {"star_padding_token": 50}, defaults).padding_token == 50


def test_a_request_for_block_positions_replaces_the_default_that_these_exclude():
    defaults = {"mode": "on", "overlap_size": 4}
    assert plan(prompt(5, 5), ON, defaults).overlap_size == 0
    with pytest.raises(OptionError, match="star_overlap_size=8 is refused: with star_positions=block no block sees"):
        plan(prompt(5, 5), ON | {"star_overlap_size": 8}, defaults)


def test_blocks_are_split_over_as_many_replicas_as_make_the_prompt_faster():
    ids, three = prompt(5, 5, 5, 5), ReplicaSet(3)
    assert (plan(ids, ON, replicas=three).replicas, plan(ids, ON).replicas) == (2, 1)
    assert plan(ids, ON | {"star_replicas": 1}, replicas=three).replicas == 1
    assert plan(ids, ON, {"replicas": 1}, replicas=three).replicas == 1
    assert plan(prompt(8, 1, 1), ON, replicas=three).replicas == 2  # the last two together take less than the first
    assert plan(ids, ON | {"star_shards": "on"}, replicas=three).shards
    with pytest.raises(OptionError, match="star_replicas=4 is refused: this server has 3"):
        plan(ids, ON | {"star_replicas": 4}, replicas=three)


def test_blocks_are_split_over_the_peers_that_are_there():
    ids = prompt(5, 5, 5, 5)
    assert plan(ids, ON, replicas=ReplicaSet(64, None, "peers", present=3)).replicas == 2
    assert plan(ids, ON | {"star_replicas": 9}, replicas=ReplicaSet(64, None, "peers", present=1)).replicas == 1


def test_auto_leaves_short_prompts_dense_before_it_looks_at_them():
    ids = prompt(5, 5)
    auto = ON | {"star": "auto"}
    assert plan(ids, auto | {"star_min_tokens": len(ids)}) is not None
    assert plan(ids, auto | {"star_min_tokens": len(ids) + 1}) is None
    assert plan(ids, auto | {"star_min_tokens": len(ids) + 1, "star_segment_token": 5}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"star_segment_token": 5},
            "star_segment_token=5 is refused: it does not occur in the context, the first 10 tokens of the prompt. "
            "Allowed: a token that starts the prompt's segments.",
        ),
        ({"star_segment_token": 99}, "star_segment_token=99 is refused: it does not occur in the context"),
        (
            {"star_overlap_size": 4},
            "star_overlap_size=4 is refused: with star_positions=block no block sees the one before it. Allowed: 0.",
        ),
        (
            {"star_num_blocks": 2},
            "star_segment_token=0 is refused: with star_num_blocks=2 the borders move with the length of the prompt. "
            "Allowed: no star_segment_token, or a star_block_size.",
        ),
        (
            {"star_replicas": 2},
            "star_replicas=2 is refused: this server has 1 (--data-parallel-size, --star-replica-peers). Allowed: auto "
            "or 1.",
        ),
        (
            {"star_shards": "on"},
            "star_shards='on' is refused: this server has one replica",
        ),
        ({"star_block_size": 10}, "star_block_size=10 is refused: "),
        ({"star_block_size": 8, "star_anchor_size": 12}, "star_anchor_size=12 is refused: it is larger than the star "),
        ({"star_anchor_size": 6}, "star_anchor_size=6 is refused: "),
        ({"star_query_tokens": 14}, "star_query_tokens=14 is refused: the prompt has only 13 tokens."),
        ({"star_padding_token": 320}, "star_padding_token=320 is refused: the model's vocabulary has 320 tokens."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused(changes, message):
    options = {key: value for key, value in (ON | changes).items() if value is not None}
    with pytest.raises(OptionError) as refused:
        plan(prompt(5, 5), options)
    assert message in str(refused.value)


def test_a_prompt_that_is_too_long_with_its_padding_is_refused():
    ids = prompt(5, 5)
    assert plan(ids, ON, limits=replace(LIMITS, max_prompt_tokens=19)).num_prompt_tokens == 19
    with pytest.raises(OptionError) as refused:
        plan(ids, ON, limits=replace(LIMITS, max_prompt_tokens=18))
    assert str(refused.value) == (
        "star_positions='block' is refused: with each block on a KV page of 4 tokens the prompt of 13 takes 19. "
        "Allowed: up to 18 tokens: fewer segments, or smaller pages (--block-size)."
    )


def test_a_servers_defaults_are_held_to_the_same_rules_where_star_is_not_off():
    wrong = {"positions": "block", "segment_token": 5, "overlap_size": 4}
    check_block_positions(parse_options(wrong, flat=False))
    check_block_positions(parse_options(wrong | {"mode": "on", "positions": "prompt"}, flat=False))
    for mode in ("on", "auto"):
        with pytest.raises(OptionError, match="star_overlap_size=4 is refused"):
            check_block_positions(parse_options(wrong | {"mode": mode}, flat=False))
