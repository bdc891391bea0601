from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateStreamRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "sampling", "star", "cache_salt", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STAR_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    sampling: SamplingParams
    star: StarOptions
    cache_salt: str
    priority: int
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., star: _Optional[_Union[StarOptions, _Mapping]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    min_tokens: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ...) -> None: ...

class StarOptions(_message.Message):
    __slots__ = ("mode", "min_tokens", "block_size", "num_blocks", "anchor_size", "overlap_size", "query_tokens", "context_tokens")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[StarOptions.Mode]
        MODE_OFF: _ClassVar[StarOptions.Mode]
        MODE_ON: _ClassVar[StarOptions.Mode]
        MODE_AUTO: _ClassVar[StarOptions.Mode]
    MODE_UNSPECIFIED: StarOptions.Mode
    MODE_OFF: StarOptions.Mode
    MODE_ON: StarOptions.Mode
    MODE_AUTO: StarOptions.Mode
    MODE_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    mode: StarOptions.Mode
    min_tokens: int
    block_size: int
    num_blocks: int
    anchor_size: int
    overlap_size: int
    query_tokens: int
    context_tokens: int
    def __init__(self, mode: _Optional[_Union[StarOptions.Mode, str]] = ..., min_tokens: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., anchor_size: _Optional[int] = ..., overlap_size: _Optional[int] = ..., query_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("delta", "final")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    final: Final
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., final: _Optional[_Union[Final, _Mapping]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Final(_message.Message):
    __slots__ = ("finish_reason", "stop_string", "stop_token_id", "usage", "plan")
    class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FINISH_REASON_UNSPECIFIED: _ClassVar[Final.FinishReason]
        FINISH_REASON_STOP: _ClassVar[Final.FinishReason]
        FINISH_REASON_LENGTH: _ClassVar[Final.FinishReason]
        FINISH_REASON_ABORT: _ClassVar[Final.FinishReason]
        FINISH_REASON_REPETITION: _ClassVar[Final.FinishReason]
    FINISH_REASON_UNSPECIFIED: Final.FinishReason
    FINISH_REASON_STOP: Final.FinishReason
    FINISH_REASON_LENGTH: Final.FinishReason
    FINISH_REASON_ABORT: Final.FinishReason
    FINISH_REASON_REPETITION: Final.FinishReason
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    finish_reason: Final.FinishReason
    stop_string: str
    stop_token_id: int
    usage: Usage
    plan: Plan
    def __init__(self, finish_reason: _Optional[_Union[Final.FinishReason, str]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("attention", "star_blocks", "block_size", "anchor_size", "overlap_size", "context_end", "prompt_tokens", "keys_attended", "dense_keys", "keys_per_context_token")
    class Attention(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ATTENTION_UNSPECIFIED: _ClassVar[Plan.Attention]
        ATTENTION_DENSE: _ClassVar[Plan.Attention]
        ATTENTION_STAR: _ClassVar[Plan.Attention]
    ATTENTION_UNSPECIFIED: Plan.Attention
    ATTENTION_DENSE: Plan.Attention
    ATTENTION_STAR: Plan.Attention
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    STAR_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_END_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEYS_ATTENDED_FIELD_NUMBER: _ClassVar[int]
    DENSE_KEYS_FIELD_NUMBER: _ClassVar[int]
    KEYS_PER_CONTEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    attention: Plan.Attention
    star_blocks: int
    block_size: int
    anchor_size: int
    overlap_size: int
    context_end: int
    prompt_tokens: int
    keys_attended: int
    dense_keys: int
    keys_per_context_token: float
    def __init__(self, attention: _Optional[_Union[Plan.Attention, str]] = ..., star_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., anchor_size: _Optional[int] = ..., overlap_size: _Optional[int] = ..., context_end: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., keys_attended: _Optional[int] = ..., dense_keys: _Optional[int] = ..., keys_per_context_token: _Optional[float] = ...) -> None: ...
