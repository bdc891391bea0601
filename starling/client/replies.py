"""Results of calls: dataclasses with the fields of the messages of starling/v1/inference.proto, which documents them.

A field that is not set is None, and an enum is its word: "stop", "star".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from google.protobuf.message import Message

from starling.v1 import inference_pb2 as pb

FinishReason = Literal["stop", "length", "abort", "repetition", "unspecified"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token; rank 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: the chosen token's, and those of the likeliest."""

    chosen: Logprob | None
    top: list[Logprob]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a prompt, one for each token."""

    tokens: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """Sources of the KV of a document, in tokens."""

    memory: int
    host: int
    storage: int
    peer: int
    computed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan by which a prompt was prefilled; ``why`` says why it was dense."""

    attention: Literal["dense", "star", "unspecified"]
    star_blocks: int
    block_size: int
    anchor_size: int
    overlap_size: int
    context_end: int
    prompt_tokens: int
    keys_attended: int
    dense_keys: int
    keys_per_context_token: float
    replicas: int
    shards: bool
    padding_tokens: int
    documents: bool
    why: str | None
    dense_heads: float
    kv_heads: int
    document_sources: list[DocumentSource]
    adapter: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of the choice ``index``."""

    text: str
    token_ids: list[int]
    index: int
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Final:
    """The last event of the choice ``index``."""

    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    plan: Plan
    index: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a prompt, with ``progress=True``."""

    computed_tokens: int
    prompt_tokens: int
    cached_tokens: int
    context_tokens: int
    star_blocks_done: int
    star_blocks: int


Event = Delta | Final | Progress | PromptLogprobs


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the n outputs."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete response."""

    choices: list[Choice]
    usage: Usage
    plan: Plan
    prompt_logprobs: PromptLogprobs | None

    @property
    def text(self) -> str:
        """Return the text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of a prompt."""

    token_ids: list[int]
    count: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class WarmedDocument:
    """Result of one document; ``error`` is empty where it was not refused."""

    index: int
    tokens: int
    source: DocumentSource | None
    error: str


@dataclass(frozen=True, slots=True)
class StarDefaults:
    """The star options of a request that gives none; None stands for a value that depends on the prompt."""

    mode: Literal["off", "on", "auto"] | None
    min_tokens: int | None
    block_size: str | None
    anchor_size: int | None
    overlap_size: int | None
    query_tokens: int | None
    segments: str | None
    segment_offsets: list[int]
    replicas: int | None
    shards: bool | None
    dense_heads: float | None
    quality: str | None
    adapter: bool | None
    retention: list[str]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Features and limits of a server."""

    models: list[str]
    max_model_len: int
    vocabulary_size: int
    kv_page_tokens: int | None
    star_available: bool
    star_refusals: list[str]
    star_defaults: StarDefaults | None
    max_request_bytes: int
    max_response_bytes: int
    max_n: int
    max_logprobs: int
    lora_names: list[str]
    starling_version: str
    vllm_version: str
    max_upload_bytes: int


KINDS: dict[type[Message], type] = {
    pb.GenerateResponse: Completion,
    pb.TokenizeResponse: Tokens,
    pb.WarmDocumentsResponse: WarmedDocument,
    pb.GetCapabilitiesResponse: Capabilities,
    pb.StarOptions: StarDefaults,
    pb.Logprob: Logprob,
    pb.TokenLogprobs: TokenLogprobs,
    pb.PromptLogprobs: PromptLogprobs,
    pb.DocumentSource: DocumentSource,
    pb.Plan: Plan,
    pb.Usage: Usage,
    pb.Delta: Delta,
    pb.Final: Final,
    pb.Progress: Progress,
    pb.Choice: Choice,
}


def read(message: Any) -> Any:
    """Return the dataclass of a message."""
    kind: Any = type(message)
    values = {}
    for name, has_presence, convert in readers(kind):
        known = not has_presence or message.HasField(name)
        values[name] = convert(getattr(message, name)) if known else None
    return KINDS[kind](**values)


@cache
def readers(kind: type[Message]) -> list[tuple[str, bool, Callable[[Any], Any]]]:
    """Return (name, whether it may be unset, what makes its value) of each field of a kind of message."""
    return [(field.name, field.has_presence, reader(field)) for field in kind.DESCRIPTOR.fields]


def reader(field: Any) -> Callable[[Any], Any]:
    """Return the function that makes the value of a field."""
    one: Callable[[Any], Any] | None = read if field.message_type is not None else None
    if field.enum_type is not None:
        names = [value.name for value in field.enum_type.values]
        prefix = names[0].removesuffix("UNSPECIFIED")
        words = {value.number: value.name.removeprefix(prefix).lower() for value in field.enum_type.values}
        one = lambda number: words.get(number, str(number))  # noqa: E731 - a newer server may have further ones
    if field.is_repeated:
        return list if one is None else lambda values: list(map(one, values))
    return one or (lambda value: value)


def read_event(message: pb.GenerateStreamResponse) -> Event | None:
    """Return the dataclass of a stream's event, or None for a newer server's event of an unknown kind."""
    kind = message.WhichOneof("event")
    return None if kind is None else read(getattr(message, kind))
