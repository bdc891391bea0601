from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateStreamRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "chat", "texts", "sampling", "star", "cache_salt", "priority", "lora_name", "progress", "session_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STAR_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LORA_NAME_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    chat: Chat
    texts: Texts
    sampling: SamplingParams
    star: StarOptions
    cache_salt: str
    priority: int
    lora_name: str
    progress: bool
    session_id: str
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., texts: _Optional[_Union[Texts, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., star: _Optional[_Union[StarOptions, _Mapping]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., lora_name: _Optional[str] = ..., progress: _Optional[bool] = ..., session_id: _Optional[str] = ...) -> None: ...

class GenerateUploadStreamRequest(_message.Message):
    __slots__ = ("head", "text", "token_ids")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    head: GenerateStreamRequest
    text: str
    token_ids: TokenIds
    def __init__(self, head: _Optional[_Union[GenerateStreamRequest, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "chat", "texts", "sampling", "star", "cache_salt", "priority", "lora_name", "session_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STAR_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LORA_NAME_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    chat: Chat
    texts: Texts
    sampling: SamplingParams
    star: StarOptions
    cache_salt: str
    priority: int
    lora_name: str
    session_id: str
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., texts: _Optional[_Union[Texts, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., star: _Optional[_Union[StarOptions, _Mapping]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., lora_name: _Optional[str] = ..., session_id: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "add_generation_prompt")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    add_generation_prompt: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., add_generation_prompt: _Optional[bool] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Texts(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "logprobs", "prompt_logprobs", "structured_outputs", "logit_bias", "bad_words", "include_stop_str_in_output", "skip_special_tokens", "extra_args")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
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
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTRA_ARGS_FIELD_NUMBER: _ClassVar[int]
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
    n: int
    logprobs: int
    prompt_logprobs: int
    structured_outputs: StructuredOutputs
    logit_bias: _containers.ScalarMap[int, float]
    bad_words: _containers.RepeatedScalarFieldContainer[str]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    extra_args: str
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., n: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., structured_outputs: _Optional[_Union[StructuredOutputs, _Mapping]] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., bad_words: _Optional[_Iterable[str]] = ..., include_stop_str_in_output: _Optional[bool] = ..., skip_special_tokens: _Optional[bool] = ..., extra_args: _Optional[str] = ...) -> None: ...

class StructuredOutputs(_message.Message):
    __slots__ = ("json_schema", "regex", "choices")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    choices: Choices
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., choices: _Optional[_Union[Choices, _Mapping]] = ...) -> None: ...

class Choices(_message.Message):
    __slots__ = ("choices",)
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, choices: _Optional[_Iterable[str]] = ...) -> None: ...

class StarOptions(_message.Message):
    __slots__ = ("mode", "min_tokens", "block_size", "anchor_size", "overlap_size", "query_tokens", "segments", "segment_offsets", "replicas", "shards", "dense_heads", "quality", "adapter", "retention")
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
    ANCHOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    DENSE_HEADS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    mode: StarOptions.Mode
    min_tokens: int
    block_size: str
    anchor_size: int
    overlap_size: int
    query_tokens: int
    segments: str
    segment_offsets: _containers.RepeatedScalarFieldContainer[int]
    replicas: int
    shards: bool
    dense_heads: float
    quality: str
    adapter: bool
    retention: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, mode: _Optional[_Union[StarOptions.Mode, str]] = ..., min_tokens: _Optional[int] = ..., block_size: _Optional[str] = ..., anchor_size: _Optional[int] = ..., overlap_size: _Optional[int] = ..., query_tokens: _Optional[int] = ..., segments: _Optional[str] = ..., segment_offsets: _Optional[_Iterable[int]] = ..., replicas: _Optional[int] = ..., shards: _Optional[bool] = ..., dense_heads: _Optional[float] = ..., quality: _Optional[str] = ..., adapter: _Optional[bool] = ..., retention: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("delta", "final", "progress", "prompt_logprobs")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    final: Final
    progress: Progress
    prompt_logprobs: PromptLogprobs
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., final: _Optional[_Union[Final, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ...) -> None: ...

class GenerateUploadStreamResponse(_message.Message):
    __slots__ = ("delta", "final", "progress", "prompt_logprobs")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    final: Final
    progress: Progress
    prompt_logprobs: PromptLogprobs
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., final: _Optional[_Union[Final, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("computed_tokens", "prompt_tokens", "cached_tokens", "context_tokens", "star_blocks_done", "star_blocks")
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAR_BLOCKS_DONE_FIELD_NUMBER: _ClassVar[int]
    STAR_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    computed_tokens: int
    prompt_tokens: int
    cached_tokens: int
    context_tokens: int
    star_blocks_done: int
    star_blocks: int
    def __init__(self, computed_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., star_blocks_done: _Optional[int] = ..., star_blocks: _Optional[int] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids", "index", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    index: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., index: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: Logprob
    top: _containers.RepeatedCompositeFieldContainer[Logprob]
    def __init__(self, chosen: _Optional[_Union[Logprob, _Mapping]] = ..., top: _Optional[_Iterable[_Union[Logprob, _Mapping]]] = ...) -> None: ...

class Logprob(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "text")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    text: str
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Final(_message.Message):
    __slots__ = ("finish_reason", "stop_string", "stop_token_id", "usage", "plan", "index")
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
    INDEX_FIELD_NUMBER: _ClassVar[int]
    finish_reason: Final.FinishReason
    stop_string: str
    stop_token_id: int
    usage: Usage
    plan: Plan
    index: int
    def __init__(self, finish_reason: _Optional[_Union[Final.FinishReason, str]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., index: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("choices", "usage", "plan", "prompt_logprobs")
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    usage: Usage
    plan: Plan
    prompt_logprobs: PromptLogprobs
    def __init__(self, choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "text", "token_ids", "logprobs", "finish_reason", "stop_string", "stop_token_id")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish_reason: Final.FinishReason
    stop_string: str
    stop_token_id: int
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[Final.FinishReason, str]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("attention", "star_blocks", "block_size", "anchor_size", "overlap_size", "context_end", "prompt_tokens", "keys_attended", "dense_keys", "keys_per_context_token", "replicas", "shards", "padding_tokens", "documents", "why", "dense_heads", "kv_heads", "document_sources", "adapter")
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
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PADDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    DENSE_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_SOURCES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
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
    replicas: int
    shards: bool
    padding_tokens: int
    documents: bool
    why: str
    dense_heads: float
    kv_heads: int
    document_sources: _containers.RepeatedCompositeFieldContainer[DocumentSource]
    adapter: bool
    def __init__(self, attention: _Optional[_Union[Plan.Attention, str]] = ..., star_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., anchor_size: _Optional[int] = ..., overlap_size: _Optional[int] = ..., context_end: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., keys_attended: _Optional[int] = ..., dense_keys: _Optional[int] = ..., keys_per_context_token: _Optional[float] = ..., replicas: _Optional[int] = ..., shards: _Optional[bool] = ..., padding_tokens: _Optional[int] = ..., documents: _Optional[bool] = ..., why: _Optional[str] = ..., dense_heads: _Optional[float] = ..., kv_heads: _Optional[int] = ..., document_sources: _Optional[_Iterable[_Union[DocumentSource, _Mapping]]] = ..., adapter: _Optional[bool] = ...) -> None: ...

class DocumentSource(_message.Message):
    __slots__ = ("memory", "host", "storage", "peer", "computed")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    memory: int
    host: int
    storage: int
    peer: int
    computed: int
    def __init__(self, memory: _Optional[int] = ..., host: _Optional[int] = ..., storage: _Optional[int] = ..., peer: _Optional[int] = ..., computed: _Optional[int] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "chat")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: Chat
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids", "count", "max_model_len")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    count: int
    max_model_len: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ..., max_model_len: _Optional[int] = ...) -> None: ...

class WarmDocumentsRequest(_message.Message):
    __slots__ = ("head", "documents", "concurrency", "cache_salt", "segments")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    head: str
    documents: _containers.RepeatedScalarFieldContainer[str]
    concurrency: int
    cache_salt: str
    segments: str
    def __init__(self, head: _Optional[str] = ..., documents: _Optional[_Iterable[str]] = ..., concurrency: _Optional[int] = ..., cache_salt: _Optional[str] = ..., segments: _Optional[str] = ...) -> None: ...

class WarmDocumentsResponse(_message.Message):
    __slots__ = ("index", "tokens", "source", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    tokens: int
    source: DocumentSource
    error: str
    def __init__(self, index: _Optional[int] = ..., tokens: _Optional[int] = ..., source: _Optional[_Union[DocumentSource, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("models", "max_model_len", "vocabulary_size", "kv_page_tokens", "star_available", "star_refusals", "star_defaults", "max_request_bytes", "max_response_bytes", "max_n", "max_logprobs", "lora_names", "starling_version", "vllm_version", "max_upload_bytes")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAR_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    STAR_REFUSALS_FIELD_NUMBER: _ClassVar[int]
    STAR_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_N_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LORA_NAMES_FIELD_NUMBER: _ClassVar[int]
    STARLING_VERSION_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedScalarFieldContainer[str]
    max_model_len: int
    vocabulary_size: int
    kv_page_tokens: int
    star_available: bool
    star_refusals: _containers.RepeatedScalarFieldContainer[str]
    star_defaults: StarOptions
    max_request_bytes: int
    max_response_bytes: int
    max_n: int
    max_logprobs: int
    lora_names: _containers.RepeatedScalarFieldContainer[str]
    starling_version: str
    vllm_version: str
    max_upload_bytes: int
    def __init__(self, models: _Optional[_Iterable[str]] = ..., max_model_len: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., kv_page_tokens: _Optional[int] = ..., star_available: _Optional[bool] = ..., star_refusals: _Optional[_Iterable[str]] = ..., star_defaults: _Optional[_Union[StarOptions, _Mapping]] = ..., max_request_bytes: _Optional[int] = ..., max_response_bytes: _Optional[int] = ..., max_n: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., lora_names: _Optional[_Iterable[str]] = ..., starling_version: _Optional[str] = ..., vllm_version: _Optional[str] = ..., max_upload_bytes: _Optional[int] = ...) -> None: ...
