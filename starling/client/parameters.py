"""The types of what a call takes. Names and meanings are those of starling/v1/inference.proto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

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
