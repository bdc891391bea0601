"""Segments that a server's front knows of a prompt: the messages of a chat, or the texts that a client has sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starling.scheduler.star.options import StarOptions, flat_name, merge, parse_options
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.segments import SEGMENT_TOKEN, SEGMENTS

NO_CHAT = "the prompt is not a chat that this server has rendered, so that it has no messages"
MOVED = (
    f"with {flat_name('positions')}=prompt segments would be padded to star blocks, which the request does not ask for"
)
TOO_LONG = "with each segment on a KV page of its own the prompt would be too long"


@dataclass(frozen=True)
class KnownSegments:
    """Where the segments of a prompt start; the last one is the question.

    Attributes:
        source: what the segments are.
        starts: token offsets of the prompt, ascending; the head is before the first one.
        refusal: why the starts are not known; None: they are.
    """

    source: Literal["messages", "texts"]
    starts: tuple[int, ...] = ()
    refusal: str | None = None


def with_known_segments(
    defaults: StarOptions, request: StarOptions | None, known: KnownSegments | None, num_tokens: int
) -> tuple[StarOptions, StarOptions | None, str | None]:
    """Replace ``segments`` = ``auto`` by offsets, and give a prompt of texts its offsets.

    Args:
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        known: what the front knows of the prompt; None: nothing.
        num_tokens: of the prompt.

    Returns:
        The server's options, the request's, and why a prompt has no segments although the server's default asks for
        them, or the prompt is texts; None: it has them, or nothing asks.

    Raises:
        OptionError: the request asks for segments that are not known, or says where the segments of texts start.
    """
    options = merge(defaults, request)
    if options.mode == "off" or (options.mode == "auto" and num_tokens < options.min_tokens):
        return defaults, request, None
    given = set() if request is None else request.model_fields_set
    if known is not None and known.source == "texts":
        refuse_beside_texts(options, given)
        if options.positions != "block":
            return defaults, request, MOVED
        own = parse_options({}, flat=True) if request is None else request
        return defaults, own.model_copy(update={"segments": known.starts}), None
    if options.segments != "auto":
        return defaults, request, None
    reason = NO_CHAT if known is None else known.refusal
    starts = None if known is None or reason is not None else known.starts
    if "segments" not in given:
        if options.positions != "block":
            starts, reason = None, reason or MOVED
        unused = {"padding_token": None} if starts is None else {}
        return defaults.model_copy(update={"segments": starts} | unused), request, reason
    assert request is not None
    if reason is not None:
        raise OptionError(SEGMENTS, "auto", reason, f"token offsets of the prompt, or a {SEGMENT_TOKEN}")
    return defaults, request.model_copy(update={"segments": starts}), None


def refuse_beside_texts(options: StarOptions, given: set[str]) -> None:
    """Refuse options of a request whose prompt is texts, which say where segments start (raises OptionError)."""
    for field, name in (("segments", SEGMENTS), ("segment_token", SEGMENT_TOKEN)):
        value = getattr(options, field)
        if field in given and value is not None:
            raise OptionError(name, value, "each text of the prompt is a segment", f"no {name} beside texts")
