"""Messages of a chat as segments of its prompt (``star_segments`` = ``auto``).

A message starts where the prompt of all messages before it ends. The server's own template finds this place: it renders
the messages before each one alone, and if that text is the beginning of the whole prompt, its length is the border. A
template's start token (``<|im_start|>``) would be simpler, but it does not say which messages a template puts into one
turn, occurs in texts that users write, and differs between models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError

from starling.config.entry import config_of
from starling.config.parsing import OptionError
from starling.config.star import StarOptions, is_star_key, merge, parse_options
from starling.engine_ext.front.call import current_call, note_star
from starling.engine_ext.front.requests import KNOWN_SEGMENTS
from starling.scheduler.planning.decide import too_short
from starling.scheduler.planning.facts import KnownSegments

MAX_RENDERED = 2**16
"""Most message parts to render for the borders of one chat, over all beginnings: about 0.6 s of a core."""

CHARACTERS_OF_A_PART = 1024
"""Number of characters that count as one part: templates copy texts, and write definitions of tools as JSON."""

ONE_MESSAGE = "the chat has one message, which is the question"
TOO_MANY_PARTS = f"the chat has more than {MAX_RENDERED // 2} parts"
NO_TEXT_ALONE = "the chat has images or other media, whose places in the prompt are not those of its text"
NO_TEXT = "the model's template makes tokens, not text, so that its messages have no borders in it"
NO_OFFSETS = "the tokenizer does not say at which characters tokens start (a fast tokenizer does)"
NOT_SEPARATE = "the chat template does not render the first message as the beginning of the whole prompt"


def generates(http_request: Any) -> bool:
    """Return whether a request of an OpenAI server generates, rather than only reads a prompt (/tokenize).

    vLLM makes a request with `vllm_xargs` of each chat of a batch.
    """
    return hasattr(http_request, "vllm_xargs") or hasattr(http_request, "to_chat_completion_request")


def note_chat_options(http_request: Any) -> None:
    """Note the options of a request to the OpenAI server before its chat is rendered.

    A request that generates nothing and a beam search have no star plan.
    """
    has_plan = generates(http_request) and not getattr(http_request, "use_beam_search", False)
    note_star((getattr(http_request, "vllm_xargs", None) or {}) if has_plan else {"star": "off"})


def auto_options(renderer: Any) -> StarOptions | None:
    """Return the options of the chat that is being rendered if they ask for its messages as segments, else None."""
    config, call = config_of(renderer.config), current_call.get()
    if config is None:
        return None
    given = {key: value for key, value in (call.star if call else {}).items() if is_star_key(key)}
    try:
        options = merge(config.star, parse_options(given) if given else None)
    except OptionError:  # the planner refuses it once it has the prompt
        return None
    return options if options.mode != "off" and options.segments == "auto" else None


def wants_segments(renderer: Any) -> bool:
    """Return whether the chat that is being rendered is to have its messages as segments."""
    return auto_options(renderer) is not None


async def add_segments(renderer: Any, messages: Sequence[Any], params: Any, engine_input: dict[str, Any]) -> None:
    """Put the segments of a rendered chat into its engine input, unless the prompt is too short for star.

    Args:
        params: vLLM's ChatParams of the chat.
    """
    options = auto_options(renderer)
    token_ids = engine_input.get("prompt_token_ids")
    if token_ids and options is not None and too_short(options, len(token_ids)) is None:
        engine_input[KNOWN_SEGMENTS] = await message_segments(renderer, messages, params, engine_input)


async def message_segments(
    renderer: Any, messages: Sequence[Any], params: Any, engine_input: Mapping[str, Any]
) -> KnownSegments:
    """Find the places in a chat's prompt at which its messages start.

    The first message, with the text that the template puts before it, is the head. A message that the template does not
    separate from the one before it, such as the second of two tool results, belongs to the segment of that one.

    Args:
        params: vLLM's ChatParams of the chat.
        engine_input: engine input of the chat, with the prompt's text and the characters of its tokens.
    """

    def refused(reason: str) -> KnownSegments:
        return KnownSegments("messages", refusal=reason)

    text, offsets = engine_input.get("prompt"), engine_input.get("prompt_token_offsets")
    if engine_input.get("type") == "multimodal":
        return refused(NO_TEXT_ALONE)
    if len(messages) < 2:
        return refused(ONE_MESSAGE)
    if not text:
        return refused(NO_TEXT)
    if not offsets:
        return refused(NO_OFFSETS)
    numbers = numbers_to_render(len(messages), num_parts(messages) + len(text) // CHARACTERS_OF_A_PART)
    if not numbers:
        return refused(TOO_MANY_PARTS)
    closed = {"add_generation_prompt": False, "continue_final_message": False}
    params = replace(params, chat_template_kwargs={**params.chat_template_kwargs, **closed})
    characters = [start for start, _ in offsets]
    starts: list[int] = []
    for number in numbers:
        beginning = await rendered_text(renderer, messages[:number], params)
        token = token_at(characters, len(beginning)) if beginning and text.startswith(beginning) else None
        if token is not None:
            starts.append(token)
        elif number == 1:  # else the first document would be a part of the head
            return refused(NOT_SEPARATE)
    return KnownSegments("messages", tuple(sorted(set(starts))))


async def refusal_of_template(renderer: Any, params: Any) -> str | None:
    """Return why no chat of a model can have its messages as segments, tried with a short chat, or None if chats can.

    Args:
        params: vLLM's ChatParams of a server.

    Raises:
        VLLMValidationError, ValueError: the model has no template, or its template refuses this chat.
    """
    roles = ("user", "assistant", "user")  # some templates have no system message
    messages = [{"role": role, "content": f"This is message {number}."} for number, role in enumerate(roles)]
    params = replace(params, chat_template_kwargs={"tokenize": False, **params.chat_template_kwargs})
    offsets = replace(renderer.default_chat_tok_params, add_special_tokens=False, return_token_offsets=True)
    _, (engine_input,) = await renderer.render_chat_async([messages], params, offsets)
    return (await message_segments(renderer, messages, params, engine_input)).refusal


def num_parts(messages: Sequence[Any]) -> int:
    """Count the parts that the renderer handles one by one: messages, the parts of their contents, and tool calls."""
    contents = sum(len(content) for message in messages if isinstance(content := message.get("content"), (list, tuple)))
    calls = sum(len(message.get("tool_calls") or ()) for message in messages)
    return len(messages) + contents + calls


def numbers_to_render(num_messages: int, parts: int) -> list[int]:
    """Return the numbers of messages before each segment: 1, 2, ..., and all but the last.

    If that would be too much work, several consecutive messages form one segment. Their number is a power of two, so
    that the borders stay in place as a chat grows. The list is empty if even two beginnings are too much.

    Args:
        parts: parts of the whole chat, at least its number of messages; no beginning has more.
    """
    if 2 * parts > MAX_RENDERED:
        return []
    step = 1
    while (num_messages // step + 1) * parts > MAX_RENDERED and step < num_messages:
        step *= 2
    return sorted({*range(1, num_messages, step), num_messages - 1})


async def rendered_text(renderer: Any, messages: Sequence[Any], params: Any) -> str | None:
    """Return the text of these messages alone, or None if the template refuses them or makes no text."""
    try:
        _, prompt = await renderer.render_messages_async(list(messages), params)
    except (VLLMValidationError, ValueError, TimeoutError):  # vLLM gives a template 30 s
        return None
    text = prompt.get("prompt")
    return text if isinstance(text, str) else None


def token_at(characters: Sequence[int], position: int) -> int | None:
    """Return the token that starts at a character, or None if a token spans it or no token follows it.

    Args:
        characters: positions of the characters at which the prompt's tokens start, ascending.
    """
    token = bisect_left(characters, position)
    return token if 0 < token < len(characters) and characters[token] == position else None
