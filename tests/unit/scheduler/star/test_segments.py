"""Segments of a prompt, moved to the borders of star blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from starling.scheduler.star.make_plan import make_plan
from starling.scheduler.star.options import StarOptions, parse_options
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.segments import (
    TokenLimits,
    align,
    check_segment_options,
    fill_gaps,
    find_gaps,
    positions_of,
)

MARK, PAD, PAGE_SIZE, BLOCK = 0, 50, 4, 8
ON = {"star": "on", "star_block_size": BLOCK, "star_segment_token": MARK, "star_query_tokens": 3}
LIMITS = TokenLimits(max_prompt_tokens=10_000, vocabulary_size=320, white_space=lambda: PAD)

segments = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def prompt(sizes: list[int], query: int = 3) -> list[int]:
    """Segments with these numbers of tokens after their marks, and a query; each segment has its own token."""
    context = [token for number, size in enumerate(sizes, 1) for token in [MARK] + [number] * size]
    return context + [99] * query


def aligned(ids: list[int], options: dict, defaults: StarOptions | None = None):
    return align(ids, defaults or StarOptions(), parse_options(options, flat=True), PAGE_SIZE, LIMITS)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 0, 3], [1, 2, 50, 50, 0, 3]),
        ([0, 1, 2, 0, 4], [0, 1, 2, 50, 0, 4]),
        ([1, 2, 3, 4, 0], [1, 2, 3, 4, 0]),
        ([1, 2, 0, 0, 2], [1, 2, 50, 50, 0, 50, 50, 50, 0, 2]),
        ([1, 0, 2, 3, 0, 4], [1, 0, 2, 3, 0, 4]),  # a tokenizer may put one token before the prompt
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([], []),
    ],
)
def test_padding_moves_each_mark_to_a_border(ids, expected):
    assert fill_gaps(ids, find_gaps(positions_of(MARK, ids, len(ids)), 4), PAD) == expected


def starts(ids: list[int]) -> list[int]:
    """The position of each segment's mark."""
    return [position for position, token in enumerate(ids) if token == MARK]


@given(segments, st.integers(0, 9))
def test_every_segment_starts_a_block_and_no_token_is_lost(sizes, leading):
    given_ids = [88] * leading + prompt(sizes)
    ids, options = aligned(given_ids, ON)
    if len(given_ids) - 3 <= BLOCK:
        assert ids == given_ids
        return
    assert all(start % BLOCK == 0 or start == leading == 1 for start in starts(ids)) and len(starts(ids)) == len(sizes)
    assert [token for token in ids if token != PAD] == given_ids
    assert len(ids) < len(given_ids) + BLOCK * len(sizes)
    plan = make_plan(len(ids), StarOptions(), options, PAGE_SIZE)
    assert plan is not None and plan.context_end == ids.index(99)
    assert aligned(ids, ON)[0] == ids


@given(segments, st.data())
def test_an_edit_within_a_segments_last_block_moves_no_other_segment(sizes, data):
    edited = data.draw(st.integers(0, len(sizes) - 1))
    size = sizes[edited] + 1  # with its mark
    length = data.draw(st.integers((size - 1) // BLOCK * BLOCK + 1, -(-size // BLOCK) * BLOCK))
    other = [*sizes[:edited], max(1, length - 1), *sizes[edited + 1 :]]
    assume(min(len(prompt(each)) for each in (sizes, other)) - 3 > BLOCK)  # a shorter prompt runs dense, unpadded
    before, after = (aligned(prompt(each), ON)[0] for each in (sizes, other))
    assert starts(before) == starts(after)


@pytest.mark.parametrize(
    ("options", "context_end"),
    [
        ({"star_query_tokens": 3}, 19),
        (
            {"star_query_tokens": None, "star_context_tokens": 10},
            13,
        ),  # 5 after the second segment's border, which is at 8
        ({"star_query_tokens": None}, 13),  # half the prompt
        ({"star_query_tokens": 0}, 21),  # the last token always sees everything
    ],
)
def test_padding_does_not_change_the_query(options, context_end):
    ids = prompt([4, 10])
    assert len(ids) == 19
    changed = {key: value for key, value in (ON | options).items() if value is not None}
    got, own = aligned(ids, changed)
    plan = make_plan(len(got), StarOptions(query_tokens=2), own, PAGE_SIZE)
    assert plan is not None and plan.context_end == context_end
    assert got[context_end:] == ids[len(ids) - (len(got) - context_end) :]


def test_the_default_block_is_that_of_the_prompt_without_padding():
    """With its padding, the prompt is beyond the power of two up to which blocks have 1,024 tokens."""
    ids = prompt([1000] * 7 + [1100])
    assert len(ids) <= 8192
    options = {"star": "on", "star_segment_token": MARK, "star_padding_token": PAD, "star_query_tokens": 3}
    got, own = aligned(ids, options)
    assert len(got) > 8192 and starts(got) == list(range(0, 8192, 1024))
    plan = make_plan(len(got), StarOptions(), own, PAGE_SIZE)
    assert (plan.block_size, plan.anchor_size, plan.overlap_size) == (1024, 1024, 0)


def test_marks_in_the_query_are_not_moved():
    ids = [*prompt([4, 10]), MARK, 99]
    assert aligned(ids, ON)[0] == aligned(prompt([4, 10]), ON | {"star_query_tokens": 1})[0] + [MARK, 99]


def test_prompts_without_star_attention_are_not_padded():
    ids = prompt([4, 10])
    defaults = parse_options({"segment_token": MARK, "block_size": BLOCK}, flat=False)
    for options in ({"star": "off"}, {}, {"star": "auto", "star_min_tokens": len(ids) + 1}):
        assert aligned(ids, options, defaults)[0] == ids
    for options in ({"star": "on"}, {"star": "auto", "star_min_tokens": len(ids)}):
        assert aligned(ids, options, defaults)[0] != ids
    assert align(ids, defaults, None, PAGE_SIZE, LIMITS) == (ids, None)
    assert aligned(ids, {"star": "on", "star_num_blocks": 3}, defaults)[0] == ids  # the mark is a server default


@pytest.mark.parametrize(
    ("options", "max_tokens", "message"),
    [
        (
            {"star_segment_token": 7},
            100,
            "star_segment_token=7 is refused: it does not occur in the context, the first 16",
        ),
        ({}, 21, r"star_segment_token=0 is refused: .* of 19 tokens has at least 22. Allowed: up to 21 tokens"),
        ({"star_query_tokens": 20}, 100, "star_query_tokens=20 is refused: the prompt has only 19"),
        ({"star_block_size": 10}, 100, "star_block_size=10 is refused"),
        (
            {"star_segment_token": 2, "star_block_size": 12},
            100,
            r"star_segment_token=2 is refused: .* of 19 tokens has at least 102",
        ),
    ],
)
def test_prompts_that_can_not_be_aligned_are_refused(options, max_tokens, message):
    limits = replace(LIMITS, max_prompt_tokens=max_tokens)
    with pytest.raises(OptionError, match=message):
        align(prompt([4, 10]), StarOptions(), parse_options(ON | options, flat=True), PAGE_SIZE, limits)


def test_a_prompt_that_would_be_too_long_is_refused_before_it_is_padded():
    ids = [1, 2, *[MARK] * 100_000]
    with pytest.raises(
        OptionError, match=r"the prompt of 100002 tokens has at least 165536. Allowed: up to 10000 tokens"
    ):
        aligned(ids, ON | {"star_block_size": 65536})


def test_the_padding_token_is_white_space_or_that_of_the_option():
    request, unknown = parse_options(ON, flat=True), replace(LIMITS, white_space=lambda: None)
    with pytest.raises(OptionError, match="star_padding_token=None is refused: star_segment_token=0 needs it"):
        align(prompt([4, 10]), StarOptions(), request, PAGE_SIZE, unknown)
    padded = align(prompt([4, 10]), StarOptions(padding_token=51), request, PAGE_SIZE, unknown)[0]
    assert padded == [51 if token == PAD else token for token in aligned(prompt([4, 10]), ON)[0]]
    for options in ({"star": "on", "star_padding_token": 9}, {"star_padding_token": 9}):
        with pytest.raises(OptionError, match="star_padding_token=9 is refused: without star_segment_token"):
            aligned(prompt([4, 10]), options)
    with pytest.raises(OptionError, match="star_padding_token=320 is refused: the model's vocabulary has 320 tokens"):
        aligned(prompt([4, 10]), ON | {"star_padding_token": 320})


def test_segments_are_refused_if_the_block_size_depends_on_the_length():
    numbered = {"star": "on", "star_num_blocks": 4, "star_segment_token": MARK}
    with pytest.raises(OptionError, match="star_segment_token=0 is refused: with star_num_blocks=4 the borders move"):
        aligned(prompt([4, 10]), numbered)
    with pytest.raises(OptionError, match="star_num_blocks=4"):
        check_segment_options(parse_options(numbered, flat=True), 320)
    with pytest.raises(OptionError, match=r"star_segment_token=320 is refused: .* 320 tokens. Allowed: 0 to 319"):
        check_segment_options(parse_options(ON | {"star_segment_token": 320}, flat=True), 320)
    with pytest.raises(OptionError, match="star_padding_token=9 is refused: without star_segment_token"):
        check_segment_options(parse_options({"padding_token": 9}, flat=False), 320)
    check_segment_options(StarOptions(), 320)
