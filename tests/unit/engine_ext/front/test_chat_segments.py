"""Messages of a chat as segments: borders of several templates, what is not known, and how much is rendered for it."""

from __future__ import annotations

import asyncio
from itertools import accumulate, pairwise
from types import SimpleNamespace

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams

from benchmarks.random_llama import CHAT_TEMPLATE
from starling.engine_ext.front.call import current_call
from starling.engine_ext.front.chat_segments import (
    MAX_RENDERED,
    NO_OFFSETS,
    NO_TEXT,
    NO_TEXT_ALONE,
    NOT_SEPARATE,
    ONE_MESSAGE,
    TOO_MANY_PARTS,
    add_segments,
    message_segments,
    note_chat_options,
    num_parts,
    numbers_to_render,
    token_at,
    wants_segments,
)
from starling.engine_ext.front.requests import KNOWN_SEGMENTS
from starling.scheduler.planning.facts import KnownSegments

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Consecutive results of tools are one turn, and earlier answers lose their thoughts.
JOINED = (
    "{% for message in messages %}"
    "{% if message.role != 'tool' or loop.first or loop.previtem.role != 'tool' %}<{{ message.role }}>{% endif %}"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}"
    "{% if message.role != 'tool' or loop.last or loop.nextitem.role != 'tool' %}</>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
COUNTED = "{{ messages | length }} messages: {% for message in messages %}{{ message.content }};{% endfor %}"
NEEDS_QUESTION = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ refuse() }}{% endif %}" + CHATML
)
ALWAYS_OPEN = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}assistant:{% endif %}", "assistant:")


def refuse():
    raise VLLMValidationError("No user query found in messages.")


class FakeRenderer:
    """Renders with a template; each token has ``width`` characters, except that each '<' starts one."""

    def __init__(self, template: str, width: int = 1, star: dict | None = None) -> None:
        self.template = jinja2.Environment().from_string(template)
        self.width = width
        self.rendered = 0
        self.config = SimpleNamespace(additional_config={} if star is None else {"starling": star})

    def text(self, messages, **kwargs) -> str:
        return self.template.render(messages=messages, refuse=refuse, **kwargs)

    async def render_messages_async(self, messages, params):
        assert isinstance(messages, list)
        self.rendered += len(messages)
        return messages, {"prompt": self.text(messages, **params.chat_template_kwargs)}

    def engine_input(self, messages, **kwargs) -> dict:
        text = self.text(messages, **{"add_generation_prompt": True} | kwargs)
        starts, last = [], None
        for position, character in enumerate(text):
            if last is None or character == "<" or position - last == self.width:
                starts.append(position)
                last = position
        offsets = list(zip(starts, [*starts[1:], len(text)], strict=True))
        return {"prompt": text, "prompt_token_ids": [7] * len(offsets), "prompt_token_offsets": offsets}


PARAMS = ChatParams(chat_template_kwargs={"add_generation_prompt": True})


def chat(*messages: str) -> list[dict[str, str]]:
    """Messages written as "role: content"."""
    return [dict(zip(("role", "content"), message.split(": ", 1), strict=True)) for message in messages]


def pieces(renderer: FakeRenderer, messages: list, **changes) -> list[str] | str:
    """The text of the head and of each segment, or why there are none."""
    engine_input = renderer.engine_input(messages) | changes
    found = asyncio.run(message_segments(renderer, messages, PARAMS, engine_input))
    if found.refusal is not None:
        assert not found.starts
        return found.refusal
    text, offsets = engine_input["prompt"], engine_input["prompt_token_offsets"]
    borders = [0, *(offsets[start][0] for start in found.starts), len(text)]
    return [text[start:stop] for start, stop in pairwise(borders)]


@pytest.mark.parametrize("width", [1, 5])
def test_each_message_behind_the_first_is_a_segment(width):
    messages = chat("system: Answer.", "user: first document", "user: second document", "user: What?")
    assert pieces(FakeRenderer(CHATML, width), messages) == [
        "<|im_start|>system\nAnswer.<|im_end|>\n",
        "<|im_start|>user\nfirst document<|im_end|>\n",
        "<|im_start|>user\nsecond document<|im_end|>\n",
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_what_a_template_puts_before_the_first_message_belongs_to_the_head():
    head, question = pieces(FakeRenderer(CHATML), chat("user: document", "user: What?"))
    assert head == "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\ndocument<|im_end|>\n"
    assert question.startswith("<|im_start|>user\nWhat?")


def test_a_message_with_the_templates_start_token_in_its_text_is_one_segment():
    found = pieces(FakeRenderer(CHATML), chat("system: Answer.", "user: a <|im_start|>user\nb", "user: What?"))
    assert found[1] == "<|im_start|>user\na <|im_start|>user\nb<|im_end|>\n"


def test_messages_that_a_template_puts_into_one_turn_are_one_segment():
    messages = chat("system: S", "user: U", "assistant: <think>hm</think>A", "tool: 1", "tool: 2", "user: V")
    assert pieces(FakeRenderer(JOINED), messages) == [
        "<system>S</>",
        "<user>U</>",
        # With its thoughts the answer is not the beginning of the whole prompt, so that the results have no border.
        "<assistant>A</><tool>12</>",
        "<user>V</><assistant>",
    ]


def test_the_question_is_what_stands_behind_the_last_border():
    assert (
        pieces(FakeRenderer(JOINED), chat("system: S", "user: U", "tool: 1", "tool: 2"))[-1] == "<tool>12</><assistant>"
    )


def test_a_border_inside_a_token_is_none():
    """This tokenizer makes one token of four characters, wherever a message ends."""
    messages = chat("system: aaa", "user: bbbb", "user: cccc", "user: d")
    starts = [len("system: aaa\n") + len("user: bbbb\n") * count for count in range(3)]
    assert starts == [12, 23, 34]
    assert pieces(FakeRenderer(CHAT_TEMPLATE, 4), messages) == [
        "system: aaa\n",
        "user: bbbb\nuser: cccc\nuser: d\nassistant:",
    ]


@pytest.mark.parametrize(
    ("template", "messages", "changes", "reason"),
    [
        (CHATML, chat("user: U"), {}, ONE_MESSAGE),
        (CHATML, chat("system: S", "user: U"), {"prompt": None}, NO_TEXT),
        (CHATML, chat("system: S", "user: U"), {"prompt_token_offsets": None}, NO_OFFSETS),
        (COUNTED, chat("system: S", "user: U"), {}, NOT_SEPARATE),
        (ALWAYS_OPEN, chat("system: S", "user: U"), {}, NOT_SEPARATE),
        (NEEDS_QUESTION, chat("system: S", "user: U", "user: V"), {}, NOT_SEPARATE),
    ],
    ids=["one message", "tokens", "slow tokenizer", "not a beginning", "always open", "refused"],
)
def test_borders_that_are_not_known(template, messages, changes, reason):
    assert pieces(FakeRenderer(template), messages, **changes) == reason


def test_messages_that_a_template_refuses_alone_are_in_the_next_segment():
    found = pieces(FakeRenderer(NEEDS_QUESTION), chat("user: U", "user: V", "user: W"))
    assert [piece.count("<|im_start|>user") for piece in found] == [1, 1, 1]


roles = st.sampled_from(["system", "user", "assistant", "tool"])
texts = st.text("ab <|>\n", max_size=12)
chats = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), min_size=2, max_size=9)


@given(chats, st.sampled_from([CHATML, CHAT_TEMPLATE]), st.booleans())
def test_segments_are_what_the_template_makes_of_each_message(messages, template, opens):
    renderer = FakeRenderer(template)
    engine_input = renderer.engine_input(messages, add_generation_prompt=opens)
    found = asyncio.run(message_segments(renderer, messages, PARAMS, engine_input))
    system = {"role": "system", "content": ""}
    head = renderer.text(messages[:1])
    own = [len(renderer.text([system, message])) - len(renderer.text([system])) for message in messages[1:-1]]
    borders = accumulate([len(head), *own])
    characters = [start for start, _ in engine_input["prompt_token_offsets"]]
    assert found == KnownSegments("messages", tuple(characters.index(border) for border in borders))


@pytest.mark.parametrize("number", [2, 3, 255, 256, 257, 300, 1000, 5000, 70_000, 10**6])
def test_the_work_is_bounded_and_borders_stay_as_a_chat_grows(number):
    numbers = numbers_to_render(number, number)
    if 2 * number > MAX_RENDERED:
        assert numbers == []
        return
    assert len(numbers) * number <= MAX_RENDERED + 2 * number
    assert numbers == sorted(set(numbers)) and (numbers[0], numbers[-1]) == (1, number - 1)
    if number < 256:
        assert numbers == list(range(1, number))
    steps = {later - earlier for earlier, later in pairwise(numbers[:-1])}
    assert all(step & (step - 1) == 0 for step in steps) and len(steps) <= 1


def test_a_chat_of_many_parts_has_fewer_beginnings_rendered_and_none_in_the_end():
    parts = [{"type": "text", "text": ""}] * 10_000
    calls = [{"type": "function"}] * 500
    many = [{"role": "user", "content": parts}, *chat(*["user: a"] * 98), {"role": "assistant", "tool_calls": calls}]
    assert num_parts(many) == 100 + 10_000 + 500
    assert len(numbers_to_render(100, num_parts(many))) <= MAX_RENDERED / num_parts(many) + 1
    assert numbers_to_render(100, MAX_RENDERED // 2 + 1) == []
    renderer = FakeRenderer("{% for message in messages %}<{{ message.role }}>{% endfor %}")
    many[0]["content"] = parts * 4
    assert pieces(renderer, many) == TOO_MANY_PARTS
    assert renderer.rendered == 0


def test_a_prompt_with_images_says_so():
    assert pieces(FakeRenderer(CHATML), chat("system: S", "user: U"), type="multimodal") == NO_TEXT_ALONE


def test_requests_that_generate_nothing_and_beam_search_render_no_beginnings():
    renderer = FakeRenderer(CHATML, star=AUTO)
    token = current_call.set(None)
    try:
        for request, wanted in (
            (SimpleNamespace(vllm_xargs=None, use_beam_search=False), True),
            (SimpleNamespace(vllm_xargs=None), True),
            (SimpleNamespace(vllm_xargs=None, use_beam_search=True), False),
            (SimpleNamespace(messages=[]), False),  # of /tokenize
        ):
            note_chat_options(request)
            assert wants_segments(renderer) is wanted
    finally:
        current_call.reset(token)


@pytest.mark.parametrize(
    ("position", "token"), [(0, None), (2, 1), (3, None), (4, 2), (5, None), (9, None)], ids=lambda value: str(value)
)
def test_the_token_at_a_character(position, token):
    assert token_at([0, 2, 4, 4], position) == token


AUTO = {"star": "on", "star_segments": "auto"}


@pytest.mark.parametrize(
    ("star", "given", "wanted"),
    [
        (None, {"star": "on", "star_segments": "auto"}, False),  # not activated
        ({}, None, False),
        ({}, {"star": "on", "star_segments": "auto"}, True),
        ({}, {"star_segments": "auto"}, False),  # star is off
        (AUTO, None, True),
        (AUTO, {"theirs": 1}, True),
        (AUTO, {"star": "off"}, False),
        (AUTO, {"star_segments": "<doc>"}, False),
        (AUTO, {"star_segments": [5]}, False),
        (AUTO, {"star_blocks": 5}, False),  # refused once the prompt is planned
    ],
)
def test_borders_are_looked_for_where_options_ask_for_them(star, given, wanted):
    token = current_call.set(None)
    try:
        note_chat_options(SimpleNamespace(vllm_xargs=given))
        assert wants_segments(FakeRenderer(CHATML, star=star)) is wanted
    finally:
        current_call.reset(token)


@pytest.mark.parametrize(("min_tokens", "known"), [(10, True), (1000, False)])
def test_a_chat_that_is_too_short_for_star_is_not_looked_at(min_tokens, known):
    renderer = FakeRenderer(CHATML, star={"star": "auto", "star_segments": "auto", "star_min_tokens": min_tokens})
    messages = chat("system: S", "user: U")
    engine_input = renderer.engine_input(messages)
    asyncio.run(add_segments(renderer, messages, PARAMS, engine_input))
    assert (KNOWN_SEGMENTS in engine_input) is known is bool(renderer.rendered)
