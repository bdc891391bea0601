"""The options of Star Attention, as server defaults and per request.

One pydantic model serves every front. The fields have a prefix where names are flat: ``mode`` is
``star`` and ``block_size`` is ``star_block_size`` as a CLI flag or in HTTP's ``vllm_xargs``; in
``--additional-config '{"starling": {"star": {...}}}'`` and in gRPC's message the bare names are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from operator import ge
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from starling.scheduler.star.parsing import OptionError, Switch, parse_fields

Mode = Literal["off", "on", "auto"]
Tokens = Annotated[int, Field(ge=0)]
# A request's JSON has a list, and strict pydantic would take a tuple only; the offsets themselves stay strict.
Offsets = Annotated[tuple[Tokens, ...], Field(strict=False, fail_fast=True)]
ReplicaCount = Literal["auto"] | Annotated[int, Field(ge=1)]

PREFIX = "star"


class StarOptions(BaseModel):
    """Star Attention as the user asks for it; sizes and counts are in tokens unless they say otherwise.

    What a size of None stands for depends on the prompt: scheduler/star/sizes.py.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mode: Mode = Field("off", description="off, on, or auto: on for prompts of at least --star-min-tokens")
    min_tokens: Tokens = Field(32768, description="with --star auto, shorter prompts stay dense")
    block_size: Tokens | None = Field(
        None,
        description="star block B, a multiple of the KV page; default an eighth of the prompt's length rounded up to a "
        "power of two, and 1024 or more; 0: --star-num-blocks says it",
    )
    num_blocks: Tokens = Field(
        0, description="cut the prompt into so many equal blocks; not with --star-block-size above 0"
    )
    anchor_size: Tokens | None = Field(
        None,
        description="anchor A, the first tokens of the prompt, which every block sees; a multiple of the page, A <= B; "
        "default B less the overlap, or, with neither given, 128 and at most B/8 in whole pages",
    )
    overlap_size: Tokens | None = Field(
        None,
        description="tokens of the previous block that a block also sees, a multiple of the page, <= B; default B less "
        "the anchor; 0 where an anchor is given, and where blocks must not depend on one another: with segments, and "
        "on a server with several replicas",
    )
    query_tokens: Tokens | None = Field(
        None,
        description="trailing prompt tokens that attend globally; default the lesser of 512 and half the prompt",
    )
    context_tokens: Tokens | None = Field(
        None,
        description="length of the context, the leading prompt tokens that are cut into blocks; not with "
        "--star-query-tokens",
    )
    replicas: ReplicaCount = Field(
        "auto",
        description="data-parallel replicas that one prompt's blocks may be split over, or auto: as many as shorten "
        "the prefill, one where blocks depend on one another. More than one needs --star-overlap-size 0, the "
        "default there",
    )
    segment_token: Tokens | None = Field(
        None,
        description="id of the token that starts a segment (a document, a message): it is moved to the next star "
        "block's border, so that an edit which changes a segment's length moves no other",
    )
    segments: Literal["auto"] | Offsets | None = Field(
        None,
        description="where segments start, without a token that marks them. auto: at the messages of a chat, of which "
        "the last one is the query. A request may give a list of token offsets instead",
    )
    padding_token: Tokens | None = Field(
        None, description="id of the token that fills the gap before a moved segment; default a space"
    )
    positions: Literal["prompt", "block"] = Field(
        "prompt",
        description="block: each segment is a block, of any length up to B, with positions of its own behind the "
        "anchor, so that its cached KV is used wherever it stands in a prompt; prompt: tokens have their positions in "
        "the prompt",
    )
    shards: Switch = Field(
        "off",
        description="on (CPUs only): the KV of a prompt that is split over several replicas stays on the replicas that "
        "computed it, and its query and output attend on each of them; off: one replica fetches all of the KV",
    )


FIELDS = StarOptions.model_fields
OFFSETS = "a list of token offsets of the prompt, 0 or more and ascending"
TOKEN = "the id of a token, 0 or more"
ALLOWED = {
    "mode": "off, on, auto",
    "block_size": "a multiple of the KV page, or 0 with num_blocks above 0",
    "anchor_size": "a multiple of the KV page from 0 to the block size",
    "overlap_size": "a multiple of the KV page from 0 to the block size",
    "replicas": "auto, or a whole number of replicas, 1 or more",
    "shards": "off, on",
    "positions": "prompt, block",
}
EXPECTED = {
    "mode": "one of off, on, auto",
    "replicas": ALLOWED["replicas"],
    "segment_token": TOKEN,
    "segments": f"auto or {OFFSETS}",
    "padding_token": TOKEN,
    "shards": "off or on",
    "positions": "prompt or block",
}


def flat_name(field: str) -> str:
    """The flat name of an option: ``mode`` -> ``star``, ``block_size`` -> ``star_block_size``."""
    return PREFIX if field == "mode" else f"{PREFIX}_{field}"


FIELD_OF = {flat_name(field): field for field in FIELDS}


def is_star_key(key: str) -> bool:
    """Whether a per-request key is Starling's to accept or refuse."""
    return key == PREFIX or key.startswith(f"{PREFIX}_")


def parse_options(values: Mapping[str, Any], *, flat: bool) -> StarOptions:
    """Parse options under their bare names, or (``flat``) under their flat ones.

    ``num_blocks`` alone means ``block_size`` 0: the default block size does not apply then.

    Raises:
        OptionError: an unknown name, a wrong type, a negative number, or two options that exclude
            one another.
    """
    show = flat_name if flat else str
    values = dict(values)
    if values.get(show("num_blocks")):
        values.setdefault(show("block_size"), 0)
    options = parse_fields(
        StarOptions,
        values,
        "star",
        expected=_expected,
        allowed=lambda field: ALLOWED.get(field, _expected(field)),
        names=FIELD_OF if flat else None,
    )
    _refuse_contradictions(options, show)
    return options


def _expected(field: str) -> str:
    return EXPECTED.get(field, "a whole number of tokens, 0 or more")


def _refuse_contradictions(options: StarOptions, show: Callable[[str], str]) -> None:
    given = options.model_fields_set
    if options.segments is not None and options.segment_token is not None:
        raise OptionError(
            show("segments"),
            options.segments,
            f"{show('segment_token')}={options.segment_token} already says where segments start",
            f"one of {show('segments')} and {show('segment_token')}",
        )
    if isinstance(options.segments, tuple):
        _check_offsets(show("segments"), options.segments)
    if {"query_tokens", "context_tokens"} <= given and None not in (
        options.query_tokens,
        options.context_tokens,
    ):
        raise OptionError(
            show("context_tokens"),
            options.context_tokens,
            f"{show('query_tokens')}={options.query_tokens} already sets where the query starts",
            f"one of {show('query_tokens')} and {show('context_tokens')}",
        )
    if {"block_size", "num_blocks"} <= given and options.block_size and options.num_blocks:
        raise OptionError(
            show("num_blocks"),
            options.num_blocks,
            f"{show('block_size')}={options.block_size} already sets the blocks",
            f"{show('num_blocks')} only with {show('block_size')}=0 or without it",
        )
    if options.block_size == 0 and not options.num_blocks:
        raise OptionError(
            show("block_size"),
            0,
            f"{show('num_blocks')} is 0 too, so the block size is undefined",
            ALLOWED["block_size"],
        )


def _check_offsets(name: str, offsets: tuple[int, ...]) -> None:
    if not offsets:
        raise OptionError(name, offsets, "the list is empty", f"{OFFSETS}, or no {name}")
    if any(map(ge, offsets, offsets[1:])):  # without a line of Python for each of a million offsets
        before, offset = next(pair for pair in pairwise(offsets) if pair[0] >= pair[1])
        raise OptionError(name, offsets, f"{offset} follows {before}", OFFSETS)


def merge(defaults: StarOptions, request: StarOptions | None) -> StarOptions:
    """A request's options over the server's: what the request gives replaces the default.

    Where the request gives one of ``query_tokens`` and ``context_tokens``, the default of the other does not apply. The
    same holds of ``segments`` and ``segment_token``. Nor does the default of the overlap apply where the request gives
    ``positions`` = ``block``, which excludes it.
    """
    if request is None:
        return defaults
    given = {name: getattr(request, name) for name in request.model_fields_set}
    base = defaults.model_dump()
    if given.get("query_tokens") is not None:
        base["context_tokens"] = None
    if given.get("context_tokens") is not None:
        base["query_tokens"] = None
    if given.get("segments") is not None:
        base["segment_token"] = None
    if given.get("segment_token") is not None:
        base["segments"] = None
    if given.get("positions") == "block":
        base["overlap_size"] = None
    return StarOptions(**(base | given))
