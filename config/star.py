"""The options of Star Attention, as server defaults and per request.

One pydantic model serves every front. Names are flat: ``mode`` is ``star`` and ``block_size`` is ``star_block_size``,
as a CLI flag, in ``--additional-config '{"starling": {"star": "auto"}}'``, in HTTP's ``vllm_xargs`` and in Python's
``extra_args``. gRPC's message StarOptions has the fields of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from operator import ge
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from starling.config.parsing import (
    OptionError,
    Share,
    Switch,
    Tokens,
    meant,
    parse_fields,
    read_number,
    read_switch,
    read_word,
)

Mode = Annotated[Literal["off", "on", "auto"], BeforeValidator(read_switch)]
Quality = Annotated[Literal["fast", "balanced", "careful"], BeforeValidator(read_word)]
Retention = Annotated[Literal["low", "normal", "high"], BeforeValidator(read_word)]

SHARE = re.compile(r"^n/([1-9][0-9]{0,8})$")
MAX_SEGMENT_TEXT = 256
"""Characters of the text of a token that starts a document."""


def read_block_size(value: Any) -> Any:
    """Return a number of tokens, or "n/8": a share of the prompt."""
    text = value.strip().replace(" ", "").lower() if isinstance(value, str) else ""
    return text if SHARE.fullmatch(text) else read_number(value)


# A request's JSON has a list, and strict pydantic would take a tuple only; the offsets themselves stay strict.
Offsets = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, fail_fast=True)]
SegmentText = Annotated[str, Field(min_length=1, max_length=MAX_SEGMENT_TEXT)]
BlockSize = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=SHARE.pattern)], BeforeValidator(read_block_size)
]
ReplicaCount = Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], BeforeValidator(read_number)]

PREFIX = "star"
QUALITY_SIZES, STAR_HEADS, STAR_LIBRARY = "star_quality_sizes", "star_heads", "star_library"
STAR_ADAPTER = "star_adapter"
"""As a server's option, the folder of an adapter; as a request's, whether it is used."""
STAR_RETENTION = "star_retention"
"""An option of a request, and not of a server."""
SERVER_ONLY = (QUALITY_SIZES, STAR_HEADS, STAR_LIBRARY)
"""Options that a server has and no request."""


class StarOptions(BaseModel):
    """Star Attention as the user asks for it; sizes are in tokens unless they say otherwise.

    What a value of None stands for depends on the prompt: scheduler/planning/decide.py, scheduler/planning/decide.py.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    if not TYPE_CHECKING:  # a type checker knows the fields by pydantic

        def __init__(self, **values: Any) -> None:
            """Make options of these values (raises OptionError: there is no such option or value)."""
            parse_options(values, flat=False)
            super().__init__(**values)

    mode: Mode = Field(default="off", description="off, on, or auto: on for prompts of at least star_min_tokens")
    min_tokens: Tokens = Field(default=32768, description="with star=auto, shorter prompts stay dense")
    quality: Quality | None = Field(
        default=None,
        description="the size of star blocks in a word: fast, a sixteenth of the prompt; balanced, an eighth; careful, "
        "a quarter; rounded up to a power of two, 1024 or more; or what the server's --star-quality-sizes says; larger "
        "blocks lose less and cost more; documents have their own lengths; default: balanced",
    )
    block_size: BlockSize | None = Field(
        default=None,
        description="star block B in tokens, a multiple of the KV page, or a share of the prompt such as n/8; default: "
        "by star_quality; with documents 8192, their longest length",
    )
    anchor_size: Tokens | None = Field(
        default=None,
        description="anchor A, the first tokens of the prompt, which every block sees; a multiple of the page, A <= B; "
        "default: 128 tokens, at most B/8, in whole pages, where blocks have the default overlap; B less a given "
        "overlap; else B",
    )
    overlap_size: Tokens | None = Field(
        default=None,
        description="tokens of the previous block that a block also sees, a multiple of the page, <= B; default: the "
        "rest of B beside the default anchor, where no anchor is given and blocks may depend on one another (no "
        "documents, one replica); else 0",
    )
    dense_heads: Share | None = Field(
        default=None,
        description="share of the KV heads, 0 to 1, that see everything before them while the others see star blocks: "
        "those that cause most of star's loss, by the server's scores; default: 0.1 where the server knows scores and "
        "blocks have an overlap, else 0",
    )
    query_tokens: Tokens | None = Field(
        default=None,
        description="trailing prompt tokens that attend to the whole prompt; default: the last document, else the "
        "lesser of 512 and half the prompt",
    )
    segments: Literal["auto", "off"] | SegmentText | Offsets | None = Field(
        default=None,
        description="where documents start, whose cached KV is used wherever they stand in a prompt: auto, at the "
        "messages of a chat; the text of the token that starts one, such as <file_sep>; in a request, a list of token "
        "offsets; off, the default: nowhere",
    )
    replicas: ReplicaCount = Field(
        default="auto",
        description="replicas that one prompt's blocks may be split over, or auto: as many as shorten the prefill, one "
        "where blocks depend on one another",
    )
    shards: Switch = Field(
        default="off",
        description="on (CPUs only): the KV of a prompt that is split over several replicas stays on the replicas that "
        "computed it, and its query and output attend on each of them; off: one replica fetches all of the KV",
    )
    adapter: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: the server's --star-adapter, where it was trained for the prompt's plan and the request "
        "names no LoRA of its own; off: the base model",
    )

    retention: Retention | Annotated[tuple[Retention, ...], Field(strict=False, fail_fast=True)] | None = Field(
        default=None,
        description="how long the prompt's cached pages stay once it has ended: low, they make room first; normal, by "
        "their last use; high, they make room last, as far as the server's retained_share goes; one word, or one for "
        "each document; default: high where the request has a session_id, else normal",
    )

    @property
    def says_where_documents_start(self) -> bool:
        return self.segments not in (None, "off")


Star = StarOptions | Mapping[str, Any] | Literal["off", "on", "auto"]
"""Star options as a Python program gives them."""

FIELDS = StarOptions.model_fields
OFFSETS = "a list of token offsets of the prompt, 0 or more and ascending"
EXPECTED = {
    "mode": "one of off, on, auto",
    "quality": "one of fast, balanced, careful",
    "block_size": "a whole number of tokens, 1 or more, or a share such as n/8",
    "dense_heads": "a share of the KV heads, 0 to 1",
    "segments": f"auto, off, the text of one token, or {OFFSETS}",
    "replicas": "auto, or a whole number of replicas, 1 or more",
    "shards": "off or on",
    "adapter": "auto or off",
    "retention": "low, normal or high, or a list of these, one for each document",
}
ALLOWED = EXPECTED | {
    "mode": "off, on, auto",
    "quality": "fast, balanced, careful",
    "block_size": "a multiple of the KV page, or a share of the prompt such as n/8",
    "anchor_size": "a multiple of the KV page from 0 to the block size",
    "overlap_size": "a multiple of the KV page from 0 to the block size",
    "shards": "off, on",
    "adapter": "auto, off; a folder is an option of the server",
}


def flat_name(field: str) -> str:
    """Return the flat name of an option: ``mode`` -> ``star``, ``block_size`` -> ``star_block_size``."""
    return PREFIX if field == "mode" else f"{PREFIX}_{field}"


FIELD_OF = {flat_name(field): field for field in FIELDS}
SHARED = {name: field for name, field in FIELD_OF.items() if name not in (STAR_ADAPTER, STAR_RETENTION)}
"""The options that mean the same to a server and to a request."""


def is_star_key(key: str) -> bool:
    """Return whether a per-request key is Starling's to accept or refuse."""
    return key == PREFIX or key.startswith(f"{PREFIX}_")


def flat_options(star: Star) -> dict[str, Any]:
    """Return star options by their flat names, unchecked.

    They are given as a word, as a mapping with either kind of names, or as StarOptions.

    A StarOptions gives those that it was made with.
    """
    if isinstance(star, StarOptions):
        return {flat_name(field): getattr(star, field) for field in FIELDS if field in star.model_fields_set}
    if isinstance(star, Mapping):
        return {name if is_star_key(name) else flat_name(name): value for name, value in star.items()}
    return {PREFIX: star}


def parse_options(values: Mapping[str, Any], *, flat: bool = True, prefix: str = "") -> StarOptions:
    """Parse options under their flat names, or under those of the model's fields; ``prefix`` is for messages.

    Raises:
        OptionError: an unknown name, a wrong type or value, or offsets of documents that do not ascend.
    """
    for name in values:
        if flat and name in SERVER_ONLY:
            flag = f"--{name.replace('_', '-')}"
            near = meant(name, FIELD_OF, misspelled=False)
            reason = f"it is an option of the server, {flag}, and not of a request{near}"
            raise OptionError(prefix + name, values[name], reason, ", ".join(FIELD_OF))
    options = parse_fields(
        StarOptions,
        values,
        "star",
        expected=_expected,
        allowed=lambda field: ALLOWED.get(field, _expected(field)),
        names=FIELD_OF if flat else None,
        prefix=prefix,
    )
    if isinstance(options.segments, tuple):
        _check_offsets(prefix + (flat_name if flat else str)("segments"), options.segments)
    return options


def _expected(field: str) -> str:
    return EXPECTED.get(field, "a whole number of tokens, 0 or more")


def _check_offsets(name: str, offsets: tuple[int, ...]) -> None:
    if not offsets:
        raise OptionError(name, offsets, "the list is empty", f"{OFFSETS}, or no {name}")
    if any(map(ge, offsets, offsets[1:])):  # without a line of Python for each of a million offsets
        before, offset = next(pair for pair in pairwise(offsets) if pair[0] >= pair[1])
        raise OptionError(name, offsets, f"{offset} follows {before}", OFFSETS)


def summary(options: StarOptions) -> str:
    """Return a server's options in a line for its log: the mode, and what else was given."""
    meaning = {
        "off": "Star Attention for requests that turn it on",
        "on": "Star Attention for all prompts",
        "auto": f"Star Attention for prompts of {options.min_tokens:,} tokens or more",
    }
    given = [field for field in FIELDS if field in options.model_fields_set - {"mode", "min_tokens"}]
    parts = [f"star={options.mode}, {meaning[options.mode]}", *(f"{flat_name(f)}={getattr(options, f)}" for f in given)]
    return "; ".join(parts)


def num_blocks(options: StarOptions) -> int | None:
    """Return the number of equal blocks of a prompt where B is a share of it, or None if B is no share."""
    return int(options.block_size.removeprefix("n/")) if isinstance(options.block_size, str) else None


def merge(defaults: StarOptions, request: StarOptions | None) -> StarOptions:
    """Merge a request's options over the server's: what the request gives replaces the default.

    A quality and a block size say the same, so that each of them replaces the other.
    """
    if request is None:
        return defaults
    given = {name: getattr(request, name) for name in request.model_fields_set}
    if given.get("quality") is not None:
        given = {"block_size": None} | given
    return StarOptions.model_construct(**(defaults.__dict__ | given))
