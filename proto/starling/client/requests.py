"""From Python's values to messages of starling.v1, by the names of their fields. Pure functions."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from starling.v1 import inference_pb2 as pb

# Text, token ids, or messages with `role` and `content`.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

PIECE_BYTES = 2**20
PROMPTS = [kind.name for kind in pb.GenerateStreamRequest.DESCRIPTOR.oneofs_by_name["prompt"].fields]
SAMPLING = list(pb.SamplingParams.DESCRIPTOR.fields_by_name)
REQUEST = [name for name in pb.GenerateStreamRequest.DESCRIPTOR.fields_by_name if name not in (*PROMPTS, "sampling")]
OF_CHAT = "add_generation_prompt"
STAR = list(pb.StarOptions.DESCRIPTOR.fields_by_name)
MODES = {name.removeprefix("MODE_").lower(): number for name, number in pb.StarOptions.Mode.items() if number}


def generate_request(
    prompt: Prompt, fields: Mapping[str, Any], without: Sequence[str] = ()
) -> pb.GenerateStreamRequest:
    """A request; a value of None is one not given.

    Args:
        fields: sampling parameters and fields of the request by name, and for messages ``add_generation_prompt``.
        without: fields of the request that the call does not have.

    Raises:
        TypeError: an unknown name, or a value of another type than its field's.
        ValueError: a number that its field can't hold, or an unknown star mode.
    """
    chat = {name: value for name, value in fields.items() if name == OF_CHAT}
    request = made(pb.GenerateStreamRequest, *prompt_field(prompt, **chat))
    own = [name for name in REQUEST if name not in without]
    for name, value in fields.items():
        if name in SAMPLING:
            fill(request.sampling, name, _sampling_value(name, value))
        elif name == "star":
            _fill_star(request.star, value or {})
        elif name in own:
            fill(request, name, value)
        elif name != OF_CHAT:
            allowed = ", ".join([*SAMPLING, *own, OF_CHAT])
            raise TypeError(f"{name} is refused: there is no such parameter. Allowed: {allowed}.")
    return request


def tokenize_request(prompt: Prompt, add_generation_prompt: bool | None) -> pb.TokenizeRequest:
    """What to tokenise (raises TypeError for token ids)."""
    kind, value = prompt_field(prompt, add_generation_prompt)
    if kind == "token_ids":
        raise TypeError("The prompt is refused: it is token ids already. Allowed: text or messages.")
    return made(pb.TokenizeRequest, kind, value)


def prompt_field(prompt: Prompt, add_generation_prompt: bool | None = None) -> tuple[str, Any]:
    """The field that takes a prompt of this kind, and its value (raises TypeError where none does)."""
    # Bytes and mappings would pass for sequences of integers.
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not hasattr(prompt, "__len__"):
        what = type(prompt).__name__
        raise TypeError(f"A prompt of type {what} is refused. Allowed: text, a list of token ids or of messages.")
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
        return "chat", {"messages": prompt, "add_generation_prompt": add_generation_prompt}
    if add_generation_prompt is not None:
        raise TypeError("add_generation_prompt is refused: it is for a prompt of messages.")
    return ("text", prompt) if isinstance(prompt, str) else ("token_ids", {"ids": prompt})


def made(kind: Any, name: str, value: Any) -> Any:
    """A message with one field set; errors have its name, which protobuf leaves out."""
    try:
        return kind(**{name: value})
    except (TypeError, ValueError) as error:
        told = TypeError if isinstance(error, TypeError) else ValueError
        raise told(f"{name}={reprlib.repr(value)} is refused: {error}") from None


def fill(message: Message, name: str, value: Any) -> None:
    """Set a field by its name."""
    if isinstance(value, str) and message.DESCRIPTOR.fields_by_name[name].is_repeated:
        value = [value]  # as vLLM takes `stop`; protobuf would make a list of its letters
    message.MergeFrom(made(type(message), name, value))


def _sampling_value(name: str, value: Any) -> Any:
    """Objects where the protocol has JSON text, and a plain list of choices."""
    if name == "extra_args" and isinstance(value, Mapping):
        return json.dumps(value)
    if name == "structured_outputs" and isinstance(value, Mapping):
        value = dict(value)
        if isinstance(value.get("json_schema"), Mapping):
            value["json_schema"] = json.dumps(value["json_schema"])
        if isinstance(value.get("choices"), (list, tuple)):
            value["choices"] = pb.Choices(choices=value["choices"])
    return value


def _fill_star(star: pb.StarOptions, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        field = "mode" if name == "star" else name.removeprefix("star_")
        if field not in STAR:
            raise TypeError(f"star option {name!r} is refused: there is none. Allowed: {', '.join(STAR)}.")
        if field == "mode" and value is not None:
            if value not in MODES:
                raise ValueError(f"star mode {value!r} is refused. Allowed: {', '.join(MODES)}.")
            value = MODES[value]
        if field == "replicas" and value == "auto":
            value = 0
        if field == "shards" and isinstance(value, str):
            if value not in ("off", "on"):
                raise ValueError(f"star_shards={value!r} is refused. Allowed: off, on.")
            value = value == "on"
        fill(star, field, value)


def parts(request: pb.GenerateStreamRequest) -> Iterator[pb.GenerateUploadStreamRequest]:
    """The same request as an upload: its head, then its prompt in pieces. Takes the prompt out of ``request``."""
    kind = request.WhichOneof("prompt")
    prompt: Any = request.text if kind == "text" else request.token_ids.ids
    request.ClearField("prompt")
    yield pb.GenerateUploadStreamRequest(head=request)
    # A character takes up to 4 bytes of UTF-8, a token id below 2^28 as many of its packed form.
    step = PIECE_BYTES // 4
    for start in range(0, len(prompt), step):
        piece = prompt[start : start + step]
        if kind == "text":
            yield pb.GenerateUploadStreamRequest(text=piece)
        else:
            yield pb.GenerateUploadStreamRequest(token_ids=pb.TokenIds(ids=piece))
