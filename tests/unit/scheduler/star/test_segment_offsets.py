"""Segments by token offsets: the same plans as with a segment token at these offsets, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from starling.scheduler.star import known_segments
from starling.scheduler.star.block_layout import TooMuchPadding, plan_blocks
from starling.scheduler.star.client_tokens import pad
from starling.scheduler.star.known_segments import NO_CHAT, KnownSegments, with_known_segments
from starling.scheduler.star.make_plan import make_plan
from starling.scheduler.star.options import StarOptions, merge, parse_options
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.segments import (
    TokenLimits,
    align,
    check_segment_options,
    positions_of,
    refuse_many_offsets,
)
from tests.unit.lines_run import lines_run

MARK, PAD, PAGE_SIZE, BLOCK, QUERY = 0, 50, 4, 8, 3
LIMITS = TokenLimits(max_prompt_tokens=10_000, vocabulary_size=320, white_space=lambda: PAD)
OWN = {"star": "on", "star_positions": "block", "star_padding_token": PAD}
MOVED = {"star": "on", "star_block_size": BLOCK}
MANY = 1_000_000


def prompt(head: int, sizes: list[int], query: int = QUERY) -> list[int]:
    """A head, segments with these numbers of tokens, their marks included, and a query."""
    context = [token for size in sizes for token in [MARK] + [7] * (size - 1)]
    return [88] * head + context + [99] * query


def own_plan(ids: list[int], options: dict, defaults: dict | None = None):
    return plan_blocks(ids, parse_options(defaults or {}, flat=False), parse_options(options, flat=True), 4, LIMITS)


def moved_plan(ids: list[int], options: dict):
    """The padded prompt and its plan, with positions of the prompt."""
    padded, request = align(ids, StarOptions(), parse_options(options, flat=True), PAGE_SIZE, LIMITS)
    return padded, make_plan(len(padded), StarOptions(), request, PAGE_SIZE)


prompts = st.builds(prompt, st.integers(0, 9), st.lists(st.integers(1, 20), min_size=1, max_size=6))


@given(prompts, st.sampled_from([4, 8, 8192]), st.sampled_from([None, 0, 4]))
def test_offsets_of_marks_give_the_plan_of_the_marks(ids, block_size, anchor_size):
    sizes = {"star_block_size": block_size, "star_anchor_size": anchor_size, "star_query_tokens": QUERY}
    own = OWN | {name: value for name, value in sizes.items() if value is not None}
    offsets = positions_of(MARK, ids, len(ids))
    assert own_plan(ids, own | {"star_segments": offsets}) == own_plan(ids, own | {"star_segment_token": MARK})


@given(prompts)
def test_the_same_holds_of_segments_that_are_moved_to_borders(ids):
    options = MOVED | {"star_query_tokens": QUERY}
    offsets = positions_of(MARK, ids, len(ids))
    by_offset = moved_plan(ids, options | {"star_segments": offsets})
    assert by_offset == moved_plan(ids, options | {"star_segment_token": MARK})


@given(prompts, st.integers(1, 9))
def test_without_a_length_the_query_is_the_last_segment(ids, query):
    """And a default length of the server, which is not that of this question, does not replace it."""
    question = len(ids) - QUERY
    offsets = [*positions_of(MARK, ids, question), question]
    given_length = own_plan(ids, OWN | {"star_segments": offsets, "star_query_tokens": QUERY})
    assert own_plan(ids, OWN | {"star_segments": offsets}, {"query_tokens": query}) == given_length
    assert moved_plan(ids, MOVED | {"star_segments": offsets}) == moved_plan(
        ids, MOVED | {"star_segments": offsets, "star_query_tokens": QUERY}
    )


@given(prompts, st.integers(0, 40))
def test_a_length_of_the_query_leaves_segments_in_the_context_alone(ids, context_tokens):
    context_tokens = min(context_tokens, len(ids) - 1)
    offsets = positions_of(MARK, ids, len(ids))
    assume(offsets[0] < context_tokens)
    options = OWN | {"star_context_tokens": context_tokens}
    inside = [offset for offset in offsets if offset < context_tokens]
    assert own_plan(ids, options | {"star_segments": offsets}) == own_plan(ids, options | {"star_segments": inside})


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_documents_in_another_order_have_the_same_blocks_in_that_order(sizes, random):
    """Without any token between them: the blocks, with the padding in their last pages, have the same tokens."""
    documents = [[10 + number] * size for number, size in enumerate(sizes)]

    def blocks(order: list[list[int]]) -> list[tuple[int, ...]]:
        head, offsets = [88] * 5, [5]
        for document in order:
            offsets.append(offsets[-1] + len(document))
        ids = [*head, *(token for document in order for token in document), 98, 99]
        made = own_plan(ids, {"star": "on", "star_positions": "block", "star_segments": offsets})
        padded, starts = pad(made, ids), [start for start, _ in made.documents[1:]]
        assert made.client_starts[-1] == offsets[-1]
        return [tuple(padded[start:stop]) for start, stop in zip(starts, [*starts[1:], made.context_end], strict=True)]

    shuffled = documents[:]
    random.shuffle(shuffled)
    assert sorted(blocks(documents)) == sorted(blocks(shuffled))


def test_padding_is_the_last_token_where_there_is_no_head():
    """The first token is then that of a document, which may be another one in the next prompt."""
    ids = [5, 5, 5, 6, 6, 6, 99]
    options = {"star": "on", "star_positions": "block", "star_segments": [0, 3, 6]}
    assert own_plan(ids, options).padding_token == 99
    assert own_plan([88, *ids], options | {"star_segments": [1, 4, 7]}).padding_token == 88


def test_a_head_and_a_question_are_dense():
    assert own_plan(prompt(9, []), OWN | {"star_segments": [9]}) is None
    assert own_plan(prompt(0, []), OWN | {"star_segments": [0]}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"star_segments": []}, "star_segments=() is refused: the list is empty."),
        (
            {"star_segments": [4, 9, 9]},
            "star_segments=(4, 9, 9) is refused: 9 follows 9. Allowed: a list of token offs",
        ),
        ({"star_segments": [9, 4]}, "star_segments=(9, 4) is refused: 4 follows 9."),
        ({"star_segments": [-1]}, "star_segments=[-1] is refused: it must be auto or a list of token offsets of the"),
        ({"star_segments": [1.0]}, "star_segments=[1.0] is refused: it must be"),
        ({"star_segments": [True]}, "star_segments=[True] is refused: it must be"),
        ({"star_segments": ["a"]}, "star_segments=['a'] is refused: it must be"),
        ({"star_segments": 5}, "star_segments=5 is refused: it must be auto or a list"),
        ({"star_segments": "texts"}, "star_segments='texts' is refused: it must be auto or a list"),
        (
            {"star_segments": [4], "star_segment_token": 7},
            "star_segments=(4,) is refused: star_segment_token=7 already says where segments start. Allowed: one of",
        ),
        (
            {"star_segments": "auto", "star_segment_token": 7},
            "star_segments='auto' is refused: star_segment_token=7 already says where segments start.",
        ),
        (
            {"star_segments": [4, 13]},
            "star_segments=(4, 13) is refused: the prompt has only 13 tokens, and 13 is not one of them. Allowed: "
            "offsets from 0 to 12.",
        ),
        (
            {"star_segments": [11, 12], "star_query_tokens": 3},
            "star_segments=(11, 12) is refused: no segment starts in the context, the first 10 tokens of the prompt.",
        ),
        (
            {"star_segments": [4, 9], "star_num_blocks": 2},
            "star_segments=(4, 9) is refused: with star_num_blocks=2 the borders move with the length of the prompt. "
            "Allowed: no star_segments, or a star_block_size.",
        ),
    ],
)
@pytest.mark.parametrize("positions", ["block", "prompt"])
def test_segments_that_can_not_be_used_are_refused(positions, options, message):
    sizes = {} if "star_num_blocks" in options else {"star_block_size": BLOCK}
    options = {"star": "on", "star_positions": positions} | sizes | options
    with pytest.raises(OptionError) as refused:
        (own_plan if positions == "block" else moved_plan)(prompt(0, [5, 5]), options)
    assert str(refused.value).startswith(message)


def test_a_long_list_is_refused_in_few_words_and_few_steps():
    offsets = list(range(MANY))

    def refused(call, error, words: str) -> None:
        with pytest.raises(error) as raised:
            call()
        assert words in str(raised.value) and len(str(raised.value)) < 700

    def steps() -> None:
        refused(
            lambda: refuse_many_offsets(offsets, 100), OptionError, "it has 1000000 elements, and the prompt has 100"
        )
        refused(
            lambda: parse_options({"star_segments": offsets[::-1]}, flat=True), OptionError, "999998 follows 999999"
        )
        refused(lambda: parse_options({"star_segments": ["x" * 999] * MANY}, flat=True), OptionError, "it must be auto")
        refused(lambda: own_plan([7] * MANY, OWN | {"star_segments": offsets}), TooMuchPadding, "takes 3999996 or more")
        refused(lambda: moved_plan([7] * MANY, MOVED | {"star_segments": offsets}), OptionError, "has at least 10")

    assert lines_run(steps) < 20_000
    refuse_many_offsets(offsets[:100], 100)
    refuse_many_offsets("auto", 1)


def test_offsets_are_no_default_of_a_server():
    check_segment_options(parse_options({"segments": "auto", "positions": "block"}, flat=False), 320)
    with pytest.raises(OptionError, match=r"star_segments=\(4, 5\) is refused: offsets are those of one prompt"):
        check_segment_options(parse_options({"segments": [4, 5]}, flat=False), 320)
    with pytest.raises(OptionError, match="star_segments='auto' is refused: with star_num_blocks=4 the borders move"):
        check_segment_options(
            parse_options({"segments": "auto", "positions": "block", "num_blocks": 4}, flat=False), 320
        )


def test_a_requests_way_to_name_segments_replaces_the_servers():
    token, auto = StarOptions(segment_token=MARK), StarOptions(segments="auto")
    offsets, mark = (
        parse_options({"star_segments": [4]}, flat=True),
        parse_options({"star_segment_token": 9}, flat=True),
    )
    assert (merge(token, offsets).segment_token, merge(token, offsets).segments) == (None, (4,))
    assert (merge(auto, mark).segment_token, merge(auto, mark).segments) == (9, None)
    assert merge(auto, parse_options({"star": "on"}, flat=True)).segments == "auto"


MESSAGES = KnownSegments("messages", (5, 9))
TEXTS = replace(MESSAGES, source="texts")
UNKNOWN = KnownSegments("messages", refusal="it rains")
AUTO = StarOptions(mode="on", segments="auto", positions="block")


def known(defaults: StarOptions, request: dict | None, segments: KnownSegments | None):
    """The resolved ``segments`` of both, and the reason why there are none."""
    options = None if request is None else parse_options(request, flat=True)
    server, own, reason = with_known_segments(defaults, options, segments, 10)
    return server.segments, None if own is None else own.segments, reason


def test_auto_becomes_the_offsets_that_the_front_knows():
    assert known(AUTO, None, MESSAGES) == ((5, 9), None, None)
    assert known(AUTO, {"star_block_size": 64}, MESSAGES) == ((5, 9), None, None)
    assert known(StarOptions(), {"star": "on", "star_segments": "auto"}, MESSAGES) == (None, (5, 9), None)


def test_a_servers_auto_leaves_a_prompt_without_messages_as_it_is():
    assert known(AUTO, None, None) == (None, None, NO_CHAT)
    assert known(AUTO, {"star_block_size": 64}, UNKNOWN) == (None, None, "it rains")


def test_a_requests_auto_is_refused_where_messages_are_not_known():
    asks = {"star": "on", "star_segments": "auto"}
    for segments, reason in ((None, NO_CHAT), (UNKNOWN, "it rains")):
        with pytest.raises(OptionError) as refused:
            known(AUTO, asks, segments)
        assert str(refused.value) == (
            f"star_segments='auto' is refused: {reason}. Allowed: token offsets of the prompt, or a star_segment_token."
        )


def test_a_servers_default_moves_no_segment_to_a_star_block():
    """Each message or text would get padding up to the next block. A request may ask for that."""
    prompt = {"star_positions": "prompt"}
    assert known(AUTO, prompt, MESSAGES) == (None, None, known_segments.MOVED)
    assert known(AUTO, prompt, TEXTS) == ("auto", None, known_segments.MOVED)
    assert known(StarOptions(mode="on"), None, TEXTS) == (None, None, known_segments.MOVED)
    assert known(AUTO, prompt | {"star_segments": "auto"}, MESSAGES) == ("auto", (5, 9), None)
    with pytest.raises(OptionError, match=r"star_segments='auto' is refused: with star_positions=prompt each message"):
        check_segment_options(StarOptions(segments="auto"), 320)
    check_segment_options(AUTO, 320)


def test_a_servers_padding_token_goes_with_its_segments():
    defaults = AUTO.model_copy(update={"padding_token": 7})
    assert with_known_segments(defaults, None, None, 10)[0].padding_token is None
    assert with_known_segments(defaults, None, MESSAGES, 10)[0].padding_token == 7


def test_texts_are_segments_by_themselves():
    assert known(StarOptions(mode="on", positions="block"), None, TEXTS) == (None, (5, 9), None)
    assert known(AUTO, {"star_block_size": 64}, TEXTS) == ("auto", (5, 9), None)
    for option in ({"star_segments": [4]}, {"star_segments": "auto"}, {"star_segment_token": 3}):
        with pytest.raises(OptionError, match="is refused: each text of the prompt is a segment"):
            known(StarOptions(mode="on"), option, TEXTS)


@pytest.mark.parametrize("segments", [None, MESSAGES, TEXTS, UNKNOWN])
def test_nothing_happens_where_star_is_off_or_no_option_asks(segments):
    off = StarOptions(segments="auto")
    assert known(off, None, segments) == ("auto", None, None)
    assert known(AUTO, {"star": "off"}, segments) == ("auto", None, None)
    short = {"star": "auto", "star_min_tokens": 11}
    assert known(AUTO, short, segments) == ("auto", None, None)
    assert known(AUTO, short | {"star_segments": "auto"}, segments) == ("auto", "auto", None)
    if segments is not TEXTS:
        assert known(StarOptions(mode="on"), {"star_segments": [4]}, segments) == (None, (4,), None)
