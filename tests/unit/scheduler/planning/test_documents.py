"""Where the documents of a prompt start and end, its plan, and which options and prompts are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from starling.config.parsing import OptionError
from starling.config.star import parse_options
from starling.scheduler.planning.decide import Decision, decide
from starling.scheduler.planning.documents import (
    NO_CHAT,
    NOT_TEXT,
    TooLong,
    cut,
    lay_out,
    positions_of,
    refuse_many_offsets,
)
from starling.scheduler.planning.facts import EngineFacts, KnownSegments, PromptFacts, ReplicaSet
from starling.scheduler.planning.plan import StarPlan, client_indexes, num_client_tokens, pad
from tests.unit.lines_run import lines_run

MARK, PAGE_SIZE, BLOCK, QUERY = 0, 4, 8, 3
ENGINE = EngineFacts(PAGE_SIZE, max_prompt_tokens=10_000, token_of={"<doc>": MARK, "<other>": 5, "<none>": 99}.get)
ON = {"star": "on", "star_segments": "<doc>", "star_query_tokens": QUERY}
MANY = 1_000_000


def prompt(*sizes: int, head: int = 0, query: int = QUERY) -> list[int]:
    """A head, documents with these numbers of tokens, their marks included, and a query."""
    return [88] * head + [token for size in sizes for token in [MARK] + [7] * (size - 1)] + [98] * query


def decided(
    ids: list[int] | int,
    options: dict | None,
    defaults: dict | None = None,
    engine: EngineFacts = ENGINE,
    known: KnownSegments | None = None,
) -> Decision:
    """What is decided of a prompt, given by its tokens or, with images, by its length."""
    facts = PromptFacts(ids) if isinstance(ids, int) else PromptFacts(len(ids), ids)
    request = parse_options(options) if options else None
    return decide(parse_options(defaults or {}), request, replace(facts, segments=known), engine)


def plan(*given, **more) -> StarPlan | None:
    return decided(*given, **more).plan


def client_blocks(ids: list[int], options: dict) -> list[tuple[int, int]]:
    """(start, end) of the plan's blocks in the client's prompt."""
    made = plan(ids, options)
    indexes = client_indexes(made).tolist()
    return [(indexes.index(start), len([one for one in indexes if one < end])) for start, end in made.documents]


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
    assert cut(positions_of(0, ids), len(ids), 4) == pieces
    assert positions_of(0, [*ids, 0]) == [*positions_of(0, ids), len(ids)]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(1, 9))
def test_pieces_follow_one_another_and_each_mark_starts_one(ids, context_end, block_size):
    context_end = min(context_end, len(ids))
    pieces = cut(positions_of(MARK, ids[:context_end]), context_end, block_size)
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


def test_the_plan_has_the_documents_of_the_prompt():
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
        (prompt(5, 5), {"star_query_tokens": 8}, None),  # the second document is in the query: one block
        (prompt(5, 5), {"star_query_tokens": 0}, [(0, 5), (5, 12)]),
        (prompt(5, 5, 4), {"star_query_tokens": None}, [(0, 5), (5, 10)]),  # the last document is the query
        (prompt(5, 5), {"star_overlap_size": 0, "star_shards": "off"}, [(0, 5), (5, 10)]),
        (prompt(5), {}, None),  # one block, which is dense
        (prompt(1, 1), {}, [(0, 1), (1, 2)]),
    ],
)
def test_a_prompt_has_a_plan_where_it_has_two_blocks(ids, options, blocks):
    given = {key: value for key, value in (ON | options).items() if value is not None}
    if blocks is None:
        assert decided(ids, given).plan is None and "one star block of 8,192" in decided(ids, given).why
    else:
        assert client_blocks(ids, given) == blocks


prompts = st.builds(
    lambda head, sizes: prompt(*sizes, head=head),
    st.integers(0, 9),
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
)


@given(prompts, st.sampled_from([4, 8, 8192]), st.sampled_from([None, 0, 4]))
def test_offsets_give_the_plan_of_the_marks_at_them(ids, block_size, anchor_size):
    sizes = {"star_block_size": block_size} | ({} if anchor_size is None else {"star_anchor_size": anchor_size})
    offsets = positions_of(MARK, ids)
    by_offset, by_mark = plan(ids, ON | sizes | {"star_segments": offsets}), plan(ids, ON | sizes)
    assert (by_offset is None) == (by_mark is None)
    if by_mark is not None:
        assert replace(by_offset, padding_token=MARK) == by_mark


@given(prompts, st.integers(1, 9))
def test_without_a_length_the_query_is_the_last_document(ids, query):
    """And a default length of the server, which is not that of this question, does not replace it."""
    question = len(ids) - QUERY
    offsets = {"star_segments": [*positions_of(MARK, ids[:question]), question]}
    given_length = plan(ids, ON | offsets)
    assert plan(ids, {"star": "on"} | offsets, {"star_query_tokens": query}) == given_length


@given(prompts, st.integers(0, 40))
def test_a_length_of_the_query_leaves_documents_in_the_context_alone(ids, context):
    context = min(context, len(ids) - 1)
    offsets = positions_of(MARK, ids)
    assume(offsets[0] < context)
    options = {"star": "on", "star_query_tokens": len(ids) - context}
    inside = [offset for offset in offsets if offset < context]
    assert plan(ids, options | {"star_segments": offsets}) == plan(ids, options | {"star_segments": inside})


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_documents_in_another_order_have_the_same_blocks_in_that_order(sizes, random):
    """Without any token between them: the blocks, with the padding in their last pages, have the same tokens."""
    documents = [[10 + number] * size for number, size in enumerate(sizes)]

    def blocks(order: list[list[int]]) -> list[tuple[int, ...]]:
        head, offsets = [88] * 5, [5, *accumulate(map(len, order), initial=5)][1:]
        ids = [*head, *(token for document in order for token in document), 98, 99]
        made = plan(ids, {"star": "on", "star_segments": offsets})
        padded, starts = pad(made, ids), [start for start, _ in made.documents[1:]]
        assert made.client_starts[-1] == offsets[-1]
        return [tuple(padded[start:stop]) for start, stop in zip(starts, [*starts[1:], made.context_end], strict=True)]

    shuffled = documents[:]
    random.shuffle(shuffled)
    assert sorted(blocks(documents)) == sorted(blocks(shuffled))


def test_padding_is_the_last_token_where_there_is_no_head():
    """The first token is then that of a document, which may be another one in the next prompt."""
    ids = [5, 5, 5, 6, 6, 6, 99]
    assert plan(ids, {"star": "on", "star_segments": [0, 3, 6]}).padding_token == 99
    assert plan([88, *ids], {"star": "on", "star_segments": [1, 4, 7]}).padding_token == 88


def test_a_default_of_documents_leaves_a_prompt_without_them_as_it_is():
    """Its blocks have one size and an overlap, and the plan says why they are no documents."""
    defaults = {"star": "on", "star_segments": "<other>", "star_block_size": BLOCK}
    made = decided(prompt(20, 5), None, defaults)
    assert made.why == "no documents: no <other> is in the prompt"
    assert made.plan == plan(prompt(20, 5), None, defaults | {"star_segments": "off"})
    assert made.plan.overlap_size and not made.plan.documents
    with_image = decided(28, None, defaults)
    assert (with_image.plan, with_image.why) == (made.plan, f"no documents: {NOT_TEXT}")
    short = decided(prompt(5, 5), None, defaults | {"star": "auto"})
    assert (short.plan, short.why) == (None, "13 tokens, below star_min_tokens 32,768")


def test_a_requests_options_replace_the_servers():
    defaults = {"star": "on", "star_segments": "<doc>", "star_query_tokens": 3, "star_block_size": BLOCK}
    ids = prompt(20, 5)
    assert len(plan(ids, {"star_query_tokens": 3}, defaults).starts) == 4
    assert len(plan(ids, {"star_block_size": 12, "star_query_tokens": 3}, defaults).starts) == 3
    assert decided(ids, {"star": "off"}, defaults).why == "star is off"
    assert not plan(ids, {"star_segments": "off"}, defaults).documents
    assert plan(ids, {"star_segments": None, "star_block_size": "n/4"}, defaults).block_size == 8
    by_offset = plan(ids, {"star_segments": [20], "star_query_tokens": 3}, defaults)
    assert by_offset.documents == ((0, 8), (8, 16), (16, 20), (20, 25))


def test_an_overlap_or_a_share_by_default_is_none_of_documents():
    defaults = {"star": "on", "star_overlap_size": 4, "star_block_size": "n/2"}
    for made in (plan(prompt(5, 5), ON, defaults), plan(prompt(5, 5), None, defaults, known=TEXTS)):
        assert (made.overlap_size, made.block_size, len(made.documents)) == (0, 8192, 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"star_block_size": "n/4"}, "star_block_size=n/4 is a share of the prompt"),
        ({"star_overlap_size": 4}, "star_overlap_size=4 is the end of the block before"),
    ],
)
def test_documents_by_default_give_way_to_what_a_request_asks_for(options, reason):
    defaults = {"star": "on", "star_segments": "<doc>", "star_block_size": BLOCK, "star_query_tokens": 3}
    made = decided(prompt(9, 9), options, defaults)
    assert not made.plan.documents and made.why == f"no documents: {reason}"
    assert made.plan == plan(prompt(9, 9), options | {"star_segments": "off"}, defaults)


def test_blocks_are_split_over_as_many_replicas_as_make_the_prompt_faster():
    ids, three = prompt(5, 5, 5, 5), replace(ENGINE, replicas=ReplicaSet(3))
    assert (plan(ids, ON, engine=three).replicas, plan(ids, ON).replicas) == (2, 1)
    assert plan(ids, ON | {"star_replicas": 1}, engine=three).replicas == 1
    assert plan(ids, ON, {"star_replicas": 1}, three).replicas == 1
    assert plan(prompt(8, 1, 1), ON, engine=three).replicas == 2  # the last two together take less than the first
    assert plan(ids, ON | {"star_shards": "on"}, engine=replace(three, num_pages=99)).shards
    with pytest.raises(OptionError, match="star_replicas=4 is refused: this server has 3"):
        plan(ids, ON | {"star_replicas": 4}, engine=three)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"star_segments": "<other>"}, "star_segments='<other>' is refused: no <other> is in the prompt"),
        ({"star_segments": "two words"}, "star_segments='two words' is refused: it is not one token of the model's"),
        ({"star_segments": ""}, "star_segments='' is refused: it must be auto, off, the text of one token, or a list"),
        ({"star_segments": "x" * 300}, "is refused: it must be"),
        ({"star_segments": []}, "star_segments=() is refused: the list is empty."),
        (
            {"star_segments": [4, 9, 9]},
            "star_segments=(4, 9, 9) is refused: 9 follows 9. Allowed: a list of token",
        ),
        ({"star_segments": [9, 4]}, "star_segments=(9, 4) is refused: 4 follows 9."),
        ({"star_segments": [-1]}, "star_segments=[-1] is refused: it must be"),
        ({"star_segments": [1.0]}, "star_segments=[1.0] is refused: it must be"),
        ({"star_segments": [True]}, "star_segments=[True] is refused: it must be"),
        ({"star_segments": ["a"]}, "star_segments=['a'] is refused: it must be"),
        ({"star_segments": 5}, "star_segments=5 is refused: it must be"),
        (
            {"star_segments": [4, 13]},
            "star_segments=(4, 13) is refused: the prompt has only 13 tokens, and 13 is not one of them. Allowed: "
            "offsets from 0 to 12.",
        ),
        (
            {"star_segments": [11, 12]},
            "star_segments=(11, 12) is refused: no document starts in the context, the first 10 tokens of the prompt.",
        ),
        (
            {"star_block_size": "n/2"},
            "star_block_size='n/2' is refused: the borders of documents would move with the length of the prompt. "
            "Allowed: a number of tokens.",
        ),
        ({"star_overlap_size": 4}, "star_overlap_size=4 is refused: no document sees the one before it. Allowed: 0."),
        (
            {"star_replicas": 2},
            "star_replicas=2 is refused: this server has 1 (--data-parallel-size). Allowed: auto",
        ),
        ({"star_shards": "on"}, "star_shards='on' is refused: this server has one replica"),
        ({"star_block_size": 10}, "star_block_size=10 is refused: "),
        ({"star_block_size": 8, "star_anchor_size": 12}, "star_anchor_size=12 is refused: it is larger than the star "),
        ({"star_anchor_size": 6}, "star_anchor_size=6 is refused: "),
        ({"star_query_tokens": 14}, "star_query_tokens=14 is refused: the prompt has only 13 tokens."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(OptionError) as refused:
        plan(prompt(5, 5), ON | changes)
    assert message in str(refused.value)


def test_documents_are_refused_where_the_engine_or_the_prompt_has_none():
    cannot = replace(ENGINE, find_document_refusals=lambda: ("M-RoPE", "fp8"))
    with pytest.raises(OptionError, match=r"star_segments='<doc>' is refused: M-RoPE; fp8. Allowed: off."):
        plan(prompt(5, 5), ON, engine=cannot)
    with pytest.raises(OptionError, match=f"star_segments='<doc>' is refused: {NOT_TEXT}"):
        plan(13, ON)


def test_a_prompt_that_is_too_long_with_its_padding_is_refused():
    ids = prompt(5, 5)
    assert plan(ids, ON, engine=replace(ENGINE, max_prompt_tokens=19)).num_prompt_tokens == 19
    small = replace(ENGINE, max_prompt_tokens=18)
    with pytest.raises(TooLong) as refused:
        plan(ids, ON, engine=small)
    assert str(refused.value) == (
        "star_segments='<doc>' is refused: with each document on a KV page of 4 tokens the prompt of 13 takes 19. "
        "Allowed: up to 18 tokens: fewer documents, or smaller pages (--block-size)."
    )
    by_default = decided(
        ids, None, {"star": "on", "star_segments": "<doc>", "star_block_size": 4}, replace(small, max_prompt_tokens=15)
    )
    assert not by_default.plan.documents and by_default.why.startswith(
        "no documents: with each document on a KV page of 4 tokens"
    )


def test_a_long_list_is_refused_in_few_words_and_few_steps():
    offsets = list(range(MANY))

    def refused(call, error, words: str) -> None:
        with pytest.raises(error) as raised:
            call()
        assert words in str(raised.value) and len(str(raised.value)) < 700

    def steps() -> None:
        refused(lambda: refuse_many_offsets(offsets, 100), OptionError, "it has 1000000 elements, and the prompt has 1")
        refused(lambda: parse_options({"star_segments": offsets[::-1]}), OptionError, "999998 follows 999999")
        refused(lambda: parse_options({"star_segments": ["x" * 999] * MANY}), OptionError, "it must be auto")
        refused(lambda: plan([7] * MANY, ON | {"star_segments": offsets}), TooLong, "takes 3999988 or more")
        refused(lambda: plan([MARK] * MANY, ON), TooLong, "takes 3999988 or more")

    assert lines_run(steps) < 20_000
    refuse_many_offsets(offsets[:100], 100)
    refuse_many_offsets("auto", 1)


MESSAGES = KnownSegments("messages", (5, 10))
TEXTS = replace(MESSAGES, source="texts")
UNKNOWN = KnownSegments("messages", refusal="it rains")
AUTO = {"star": "on", "star_segments": "auto", "star_block_size": 64}
TWO = ((0, 5), (8, 13))


def test_auto_becomes_the_offsets_that_the_front_knows():
    ids = prompt(5, 5)
    for options, defaults in ((None, AUTO), ({"star_block_size": 64}, AUTO), (AUTO, None)):
        made = decided(ids, options, defaults, known=MESSAGES)
        assert (made.plan.documents, made.why) == (TWO, None)
        assert made.plan.client_starts[-1] == 10


def test_a_servers_auto_leaves_a_prompt_without_messages_as_it_is():
    ids = prompt(50, 50)
    for known, reason in ((None, NO_CHAT), (UNKNOWN, "it rains")):
        for options in (None, {"star_block_size": BLOCK}):
            made = decided(ids, options, AUTO | {"star_block_size": BLOCK}, known=known)
            assert made.why == f"no documents: {reason}"
            assert made.plan == plan(ids, {"star": "on", "star_block_size": BLOCK})


def test_a_requests_auto_is_refused_where_messages_are_not_known():
    for known, reason in ((None, NO_CHAT), (UNKNOWN, "it rains")):
        with pytest.raises(OptionError) as refused:
            decided(prompt(5, 5), AUTO, AUTO, known=known)
        assert str(refused.value) == (
            f"star_segments='auto' is refused: {reason}. Allowed: off, token offsets of the prompt, or the text of a "
            "token."
        )


def test_a_chat_whose_only_document_is_the_question_has_no_documents():
    """Then the head is cut into blocks of one size, and the question is the query."""
    ids = prompt(50, 3)
    made = decided(ids, None, AUTO | {"star_block_size": BLOCK}, known=KnownSegments("messages", (50,)))
    assert not made.plan.documents and made.plan.context_end == 50 and made.plan.overlap_size


def test_texts_are_documents_by_themselves():
    ids = prompt(5, 5)
    for options, defaults in ((None, {"star": "on"}), ({"star_block_size": 64}, AUTO), ({"star": "on"}, None)):
        assert plan(ids, options, defaults, known=TEXTS).documents == TWO
    for segments in ([4], "auto", "<doc>"):
        with pytest.raises(OptionError, match="is refused: each text of the prompt is a document"):
            plan(ids, {"star": "on", "star_segments": segments}, known=TEXTS)
    assert not plan(prompt(50, 50), {"star": "on", "star_block_size": 8, "star_segments": "off"}, known=TEXTS).documents
    with pytest.raises(OptionError, match="star_block_size='n/2' is refused: the borders of documents would move"):
        plan(ids, {"star": "on", "star_block_size": "n/2"}, known=TEXTS)
    cannot = replace(ENGINE, find_document_refusals=lambda: ("M-RoPE",))
    made = decided(prompt(50, 50), {"star": "on", "star_block_size": BLOCK}, engine=cannot, known=TEXTS)
    assert not made.plan.documents and made.why == "M-RoPE"


@pytest.mark.parametrize("known", [None, MESSAGES, TEXTS, UNKNOWN])
def test_known_documents_do_nothing_where_star_is_off_or_the_prompt_is_short(known):
    assert plan(prompt(5, 5), None, AUTO | {"star": "off"}, known=known) is None
    assert plan(prompt(5, 5), {"star": "off"}, AUTO, known=known) is None
    short = AUTO | {"star": "auto", "star_min_tokens": 14}
    assert plan(prompt(5, 5), short, known=known) is None
    if known is not TEXTS:
        assert plan(prompt(5, 5), {"star": "on", "star_segments": [0, 4, 9]}, known=known).documents == ((0, 4), (4, 9))
