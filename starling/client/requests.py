"""Makes messages of starling.v1 from Python values, by the names of the messages' fields. Pure functions."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Protocol, TypedDict

from google.protobuf.message import Message as ProtoMessage

from starling.v1 import inference_pb2 as pb

Prompt = str | Sequence[str] | Sequence[int]
"""Text; texts that are tokenised one by one: a head, documents and a question; or token ids."""

Mode = Literal["off", "on", "auto"]


class TextPart(TypedDict):
    """A part of a message, as OpenAI's API has it."""

    type: Literal["text"]
    text: str


class Message(TypedDict):
    """A message of a chat. The texts of several parts become lines of one text."""

    role: str
    content: str | Sequence[TextPart]


class Options(Protocol):
    """Protocol of starling.StarOptions, a pydantic model that this package does not import."""

    def model_dump(self, *, exclude_unset: bool = ...) -> dict[str, Any]: ...


Star = Mode | bool | Mapping[str, Any] | Options
"""Star Attention's options: a mode, options by their names with or without `star_`, or starling.StarOptions."""


class StructuredOutputs(TypedDict, total=False):
    """One of three constraints."""

    json_schema: str | Mapping[str, Any]
    regex: str
    choices: Sequence[str]


class Sampling(TypedDict, total=False):
    """Sampling parameters; None counts as not given."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    max_tokens: int | None
    min_tokens: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    structured_outputs: StructuredOutputs | None
    logit_bias: Mapping[int, float] | None
    bad_words: str | Sequence[str] | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    extra_args: str | Mapping[str, Any] | None


class StarFields(TypedDict, total=False):
    """Star options under the names that they have everywhere, beside ``star``, the mode."""

    star_min_tokens: int | None
    star_quality: str | None
    star_block_size: int | str | None
    star_anchor_size: int | None
    star_overlap_size: int | None
    star_dense_heads: float | str | None
    star_query_tokens: int | None
    star_segments: str | Sequence[int] | None
    star_replicas: int | Literal["auto"] | None
    star_shards: Literal["off", "on"] | bool | None
    star_adapter: Literal["off", "auto"] | bool | None
    star_retention: str | Sequence[str] | None


class GenerateFields(Sampling, StarFields, total=False):
    """Fields that `generate` takes beside the prompt; ``add_generation_prompt`` is for messages."""

    request_id: str | None
    cache_salt: str | None
    priority: int | None
    lora_name: str | None
    session_id: str | None
    add_generation_prompt: bool | None


class StreamFields(GenerateFields, total=False):
    """Fields that `stream` takes beside the prompt."""

    progress: bool | None


PIECE_BYTES = 2**20
PROMPTS = [kind.name for kind in pb.GenerateStreamRequest.DESCRIPTOR.oneofs_by_name["prompt"].fields]
SAMPLING = list(pb.SamplingParams.DESCRIPTOR.fields_by_name)
REQUEST = [name for name in pb.GenerateStreamRequest.DESCRIPTOR.fields_by_name if name not in (*PROMPTS, "sampling")]
CHAT_FIELD = "add_generation_prompt"
STAR = list(pb.StarOptions.DESCRIPTOR.fields_by_name)
MESSAGE = list(pb.ChatMessage.DESCRIPTOR.fields_by_name)
SWITCHES = {"shards": "on", "adapter": "auto"}
"""Star options that the protocol has as a bool, and the word for true."""
MODES = {name.removeprefix("MODE_").lower(): number for name, number in pb.StarOptions.Mode.items() if number}


def generate_request(
    prompt: Prompt | None,
    fields: Mapping[str, Any],
    *,
    messages: Sequence[Message] | None = None,
    without: Sequence[str] = (),
) -> pb.GenerateStreamRequest:
    """Make a request of a prompt or of messages. A value of None counts as not given.

    Args:
        fields: sampling parameters, star options and fields of the request by name, and for messages
            ``add_generation_prompt``.
        without: fields of the request that the call does not have.

    Raises:
        TypeError: an unknown name, a value of another type than its field's, a prompt of an unknown kind, or not one of
            prompt and messages.
        ValueError: a number that its field can't hold, unknown star mode, or shards that are neither off nor on.
    """
    request = make_message(pb.GenerateStreamRequest, *prompt_field(prompt, messages, fields.get(CHAT_FIELD)))
    own = [name for name in REQUEST if name not in without]
    for name, value in fields.items():
        if name in SAMPLING:
            set_field(request.sampling, name, _sampling_value(name, value))
        elif name == "star":
            set_star(request.star, star_fields(value))
        elif name.startswith("star_"):
            set_star(request.star, {name: value})
        elif name in own:
            set_field(request, name, value)
        elif name != CHAT_FIELD:
            raise TypeError(f"{name} is refused: {no_such('parameter', name, [*SAMPLING, *own, CHAT_FIELD, 'star'])}")
    return request


def no_such(kind: str, name: str, allowed: Sequence[str]) -> str:
    """Return what is wrong with a name, the one that it may be meant for, and those that there are."""
    hint = "".join(f", did you mean {close}" for close in get_close_matches(name[:64], allowed, 1, 0.8))
    return f"there is no such {kind}{hint}. Allowed: {', '.join(allowed)}."


def tokenize_request(
    prompt: Prompt | None, messages: Sequence[Message] | None, add_generation_prompt: bool | None
) -> pb.TokenizeRequest:
    """Make a request to tokenise text or messages.

    Raises:
        TypeError: the prompt is texts or token ids, or of an unknown kind.
    """
    kind, value = prompt_field(prompt, messages, add_generation_prompt)
    if kind == "token_ids":
        raise TypeError("The prompt is refused: it is token ids already. Allowed: text or messages.")
    if kind == "texts":
        raise TypeError("The prompt is refused: it is several texts. Allowed: text or messages.")
    return make_message(pb.TokenizeRequest, kind, value)


def warm_request(
    documents: Sequence[str], head: str, concurrency: int, cache_salt: str | None, segments: str | None
) -> pb.WarmDocumentsRequest:
    """Make a request to compute documents.

    Raises:
        TypeError, ValueError: a value that its field can't hold; or one text in place of several.
    """
    if isinstance(documents, str):
        raise TypeError("documents is refused: it is one text. Allowed: a list of texts.")
    request = pb.WarmDocumentsRequest()
    values = {
        "documents": documents,
        "head": head,
        "concurrency": concurrency,
        "cache_salt": cache_salt,
        "segments": segments,
    }
    for name, value in values.items():
        if value is not None:
            set_field(request, name, value)
    return request


def prompt_field(
    prompt: Prompt | None, messages: Sequence[Message] | None, add_generation_prompt: bool | None
) -> tuple[str, Any]:
    """Return the field for a prompt of this kind or for messages, and the field's value.

    Raises:
        TypeError: the prompt is of an unknown kind, or not one of prompt and messages is given, or
            ``add_generation_prompt`` without messages.
        ValueError: a message has content other than text.
    """
    if messages is not None and prompt is None:
        if isinstance(messages, (str, bytes, Mapping)):
            what, fields = type(messages).__name__, " and ".join(MESSAGE)
            raise TypeError(f"messages of type {what} is refused. Allowed: a list of messages, each with {fields}.")
        chat = [with_text(index, message) for index, message in enumerate(messages)]
        return "chat", {"messages": chat, "add_generation_prompt": add_generation_prompt}
    if messages is not None or prompt is None:
        given = "both" if messages is not None else "neither"
        raise TypeError(f"The prompt is refused: {given} of prompt and messages are given. Allowed: one of them.")
    if add_generation_prompt is not None:
        raise TypeError("add_generation_prompt is refused: there are no messages. Allowed: with messages.")
    # Bytes are a sequence of integers too, and a mapping may have integers as keys.
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not hasattr(prompt, "__len__"):
        what = type(prompt).__name__
        raise TypeError(f"A prompt of type {what} is refused. Allowed: text, a list of texts or of token ids.")
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
        raise TypeError("The prompt is refused: it is messages. Allowed: messages=[...].")
    if isinstance(prompt, str):
        return "text", prompt
    if len(prompt) and isinstance(prompt[0], str):
        return "texts", {"texts": prompt}
    return "token_ids", {"ids": prompt}


def with_text(index: int, message: Message) -> Any:
    """Return a message of a chat whose content is one text: parts of OpenAI's kind are joined by lines, as in vLLM.

    Raises:
        TypeError: a field has no such name.
        ValueError: a part is no text.
    """
    if not isinstance(message, Mapping):
        return message  # protobuf says what is wrong with it
    for name in message:
        if name not in MESSAGE:
            raise TypeError(f"messages[{index}].{name} is refused: {no_such('field', str(name), MESSAGE)}")
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            name, value = f"messages[{index}].content[{number}]", reprlib.repr(part)
            allowed = 'text, or parts such as {"type": "text", "text": "..."}'
            raise ValueError(f"{name}={value} is refused: it is no text. Allowed: {allowed}. Send images over HTTP.")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def make_message(kind: Any, name: str, value: Any) -> Any:
    """Make a message with one field set.

    Raises:
        TypeError, ValueError: protobuf's error for the value, with the field's name, which protobuf leaves out.
    """
    try:
        return kind(**{name: value})
    except (TypeError, ValueError) as error:
        error_type = TypeError if isinstance(error, TypeError) else ValueError
        raise error_type(f"{name}={reprlib.repr(value)} is refused: {error}") from None


def set_field(message: ProtoMessage, name: str, value: Any) -> None:
    """Set a field by its name (raises TypeError, ValueError: as ``make_message``)."""
    if isinstance(value, str) and message.DESCRIPTOR.fields_by_name[name].is_repeated:
        value = [value]  # vLLM allows one text for `stop`; protobuf would make a list of its letters
    message.MergeFrom(make_message(type(message), name, value))


def _sampling_value(name: str, value: Any) -> Any:
    """Convert objects to the JSON text that the protocol has, and a plain list of choices to its message."""
    if name == "extra_args" and isinstance(value, Mapping):
        return json.dumps(value)
    if name == "structured_outputs" and isinstance(value, Mapping):
        value = dict(value)
        if isinstance(value.get("json_schema"), Mapping):
            value["json_schema"] = json.dumps(value["json_schema"])
        if isinstance(value.get("choices"), (list, tuple)):
            value["choices"] = pb.Choices(choices=value["choices"])
    return value


def share_of(name: str, value: Any) -> float:
    """Return the share that a number or a text is, "0.1" or "10%" (raises ValueError)."""
    text = value.strip() if isinstance(value, str) else value
    try:
        if isinstance(text, bool):
            raise TypeError
        share = float(text.removesuffix("%")) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is refused. Allowed: a share of the KV heads, 0 to 1.") from None
    return share


def star_fields(star: Star | None) -> Mapping[str, Any]:
    """Return star options by their names: of a mode, of a mapping, or those with which StarOptions were made."""
    if isinstance(star, Mapping):
        return star
    dump = getattr(star, "model_dump", None)
    return {"mode": star} if dump is None else dump(exclude_unset=True)


def set_star(star: pb.StarOptions, options: Mapping[str, Any]) -> None:
    """Set star options by their names, with the prefix ``star_`` or without (raises TypeError, ValueError)."""
    for name, value in options.items():
        field = "mode" if name == "star" else name.removeprefix("star_")
        if field == "segments" and isinstance(value, (list, tuple)):
            field = "segment_offsets"
        if field not in STAR:
            prefix = name[: len(name) - len(field)]  # as the caller writes the names
            allowed = [prefix + known if known != "mode" or not prefix else "star" for known in STAR]
            raise TypeError(f"star option {name!r} is refused: {no_such('option', name, allowed)}")
        if field == "mode" and value is not None:
            value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else str(value).lower()
            if value not in MODES:
                raise ValueError(f"star mode {value!r} is refused. Allowed: {', '.join(MODES)}.")
            value = MODES[value]
        if field == "replicas" and value == "auto":
            value = 0
        if field == "block_size" and value is not None:
            value = str(value)
        if field == "retention" and isinstance(value, str):
            value = [value]
        if field == "dense_heads" and value is not None:
            value = share_of(name, value)
        for switch, is_on in SWITCHES.items():
            if field == switch and isinstance(value, str):
                value = {"true": is_on, "false": "off"}.get(value.lower(), value.lower())
                if value not in ("off", is_on):
                    raise ValueError(f"star_{field}={value!r} is refused. Allowed: off, {is_on}.")
                value = value == is_on
        set_field(star, field, value)


def upload_parts(request: pb.GenerateStreamRequest) -> Iterator[pb.GenerateUploadStreamRequest]:
    """Yield a request as an upload: its head, then its prompt in pieces. Removes the prompt from ``request``."""
    kind = request.WhichOneof("prompt")
    prompt: Any = request.text if kind == "text" else request.token_ids.ids
    request.ClearField("prompt")
    yield pb.GenerateUploadStreamRequest(head=request)
    # A character takes up to 4 bytes of UTF-8; a token id below 2^28 takes up to 4 bytes of a packed field.
    step = PIECE_BYTES // 4
    for start in range(0, len(prompt), step):
        piece = prompt[start : start + step]
        if kind == "text":
            yield pb.GenerateUploadStreamRequest(text=piece)
        else:
            yield pb.GenerateUploadStreamRequest(token_ids=pb.TokenIds(ids=piece))
