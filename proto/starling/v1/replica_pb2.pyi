from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("name", "properties")
    class PropertiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROPERTIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    properties: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., properties: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PrefillPartRequest(_message.Message):
    __slots__ = ("prompt", "part", "release", "renew")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    part: Part
    release: Release
    renew: Renew
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ...) -> None: ...

class PrefillPartResponse(_message.Message):
    __slots__ = ("state", "alive", "held", "aborted", "renewed")
    STATE_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    RENEWED_FIELD_NUMBER: _ClassVar[int]
    state: PromptState
    alive: Alive
    held: HeldPart
    aborted: PartAborted
    renewed: Renewed
    def __init__(self, state: _Optional[_Union[PromptState, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., held: _Optional[_Union[HeldPart, _Mapping]] = ..., aborted: _Optional[_Union[PartAborted, _Mapping]] = ..., renewed: _Optional[_Union[Renewed, _Mapping]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("request_id", "token_ids", "block_size", "anchor_size", "context_end", "cache_salt", "priority", "blocks", "adapter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_END_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_size: int
    anchor_size: int
    context_end: int
    cache_salt: str
    priority: int
    blocks: _containers.RepeatedCompositeFieldContainer[BlockSpan]
    adapter: str
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., anchor_size: _Optional[int] = ..., context_end: _Optional[int] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[BlockSpan, _Mapping]]] = ..., adapter: _Optional[str] = ...) -> None: ...

class BlockSpan(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("first_block", "stop_block")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    STOP_BLOCK_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    stop_block: int
    def __init__(self, first_block: _Optional[int] = ..., stop_block: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Renew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PromptState(_message.Message):
    __slots__ = ("cached", "has_anchor", "queued_tokens")
    CACHED_FIELD_NUMBER: _ClassVar[int]
    HAS_ANCHOR_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    cached: bytes
    has_anchor: bool
    queued_tokens: int
    def __init__(self, cached: _Optional[bytes] = ..., has_anchor: _Optional[bool] = ..., queued_tokens: _Optional[int] = ...) -> None: ...

class Alive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PartAborted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Renewed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HeldPart(_message.Message):
    __slots__ = ("start", "page_ids", "addresses", "hold")
    START_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    start: int
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    addresses: bytes
    hold: int
    def __init__(self, start: _Optional[int] = ..., page_ids: _Optional[_Iterable[int]] = ..., addresses: _Optional[bytes] = ..., hold: _Optional[int] = ...) -> None: ...
