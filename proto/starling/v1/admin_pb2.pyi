from starling.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("starling_version", "vllm_version", "torch_version", "models", "uptime_seconds", "star_defaults", "limits", "draining", "attention_backends", "refused_features")
    STARLING_VERSION_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STAR_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKENDS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    starling_version: str
    vllm_version: str
    torch_version: str
    models: _containers.RepeatedScalarFieldContainer[str]
    uptime_seconds: float
    star_defaults: _inference_pb2.StarOptions
    limits: Limits
    draining: bool
    attention_backends: _containers.RepeatedScalarFieldContainer[str]
    refused_features: _containers.RepeatedCompositeFieldContainer[RefusedFeature]
    def __init__(self, starling_version: _Optional[str] = ..., vllm_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., uptime_seconds: _Optional[float] = ..., star_defaults: _Optional[_Union[_inference_pb2.StarOptions, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., draining: _Optional[bool] = ..., attention_backends: _Optional[_Iterable[str]] = ..., refused_features: _Optional[_Iterable[_Union[RefusedFeature, _Mapping]]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_model_tokens", "max_running_requests", "max_step_tokens", "max_queued_requests", "max_queued_tokens", "max_message_bytes")
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_model_tokens: int
    max_running_requests: int
    max_step_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    max_message_bytes: int
    def __init__(self, max_model_tokens: _Optional[int] = ..., max_running_requests: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class RefusedFeature(_message.Message):
    __slots__ = ("feature", "reason")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    feature: str
    reason: str
    def __init__(self, feature: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetCacheStateRequest(_message.Message):
    __slots__ = ("per_request",)
    PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    per_request: bool
    def __init__(self, per_request: _Optional[bool] = ...) -> None: ...

class GetCacheStateResponse(_message.Message):
    __slots__ = ("engines", "unanswered")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineCache]
    unanswered: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineCache, _Mapping]]] = ..., unanswered: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineCache(_message.Message):
    __slots__ = ("pages_total", "pages_used", "pages_cached", "pages_free", "requests_running", "requests_waiting", "groups", "requests", "capacity_tokens", "uncompressed_capacity_tokens")
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCOMPRESSED_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    requests_running: int
    requests_waiting: int
    groups: _containers.RepeatedCompositeFieldContainer[CacheGroup]
    requests: _containers.RepeatedCompositeFieldContainer[RequestCache]
    capacity_tokens: int
    uncompressed_capacity_tokens: int
    def __init__(self, pages_total: _Optional[int] = ..., pages_used: _Optional[int] = ..., pages_cached: _Optional[int] = ..., pages_free: _Optional[int] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[CacheGroup, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[RequestCache, _Mapping]]] = ..., capacity_tokens: _Optional[int] = ..., uncompressed_capacity_tokens: _Optional[int] = ...) -> None: ...

class CacheGroup(_message.Message):
    __slots__ = ("kind", "layers", "page_bytes", "page_tokens", "page_states", "tokens_per_state", "compression", "pages_used", "pages_cached", "bytes_per_token", "states_used")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_STATES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_STATE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_USED_FIELD_NUMBER: _ClassVar[int]
    kind: str
    layers: int
    page_bytes: int
    page_tokens: int
    page_states: int
    tokens_per_state: float
    compression: float
    pages_used: int
    pages_cached: int
    bytes_per_token: float
    states_used: int
    def __init__(self, kind: _Optional[str] = ..., layers: _Optional[int] = ..., page_bytes: _Optional[int] = ..., page_tokens: _Optional[int] = ..., page_states: _Optional[int] = ..., tokens_per_state: _Optional[float] = ..., compression: _Optional[float] = ..., pages_used: _Optional[int] = ..., pages_cached: _Optional[int] = ..., bytes_per_token: _Optional[float] = ..., states_used: _Optional[int] = ...) -> None: ...

class RequestCache(_message.Message):
    __slots__ = ("request_id", "engine_request_id", "status", "computed_tokens", "prompt_tokens", "cached_tokens", "groups")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    engine_request_id: str
    status: str
    computed_tokens: int
    prompt_tokens: int
    cached_tokens: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupUsage]
    def __init__(self, request_id: _Optional[str] = ..., engine_request_id: _Optional[str] = ..., status: _Optional[str] = ..., computed_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupUsage, _Mapping]]] = ...) -> None: ...

class GroupUsage(_message.Message):
    __slots__ = ("pages", "states")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    states: int
    def __init__(self, pages: _Optional[int] = ..., states: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("found", "unknown")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedScalarFieldContainer[str]
    unknown: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, found: _Optional[_Iterable[str]] = ..., unknown: _Optional[_Iterable[str]] = ...) -> None: ...

class ResetPrefixCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResetPrefixCacheResponse(_message.Message):
    __slots__ = ("reset",)
    RESET_FIELD_NUMBER: _ClassVar[int]
    reset: bool
    def __init__(self, reset: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("wait_seconds",)
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    wait_seconds: float
    def __init__(self, wait_seconds: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("requests_left",)
    REQUESTS_LEFT_FIELD_NUMBER: _ClassVar[int]
    requests_left: int
    def __init__(self, requests_left: _Optional[int] = ...) -> None: ...
