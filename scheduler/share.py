"""What goes to an engine with one request's part of a prompt that several replicas prefill.

The front that splits the prompt (engine_ext/spreading.py) makes these, the scheduler and the KV connector of each
replica read them from the request's ``extra_args``. Clients can't: a `Share` is no JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SHARE_KEY = "starling_share"
CONNECTOR = "StarConnector"  # which moves the pages between replicas: engine_ext/star_connector.py


@dataclass(frozen=True)
class Part:
    """Prefill the prompt's tokens from ``start`` on, and hold their pages until told to let go.

    Attributes:
        name: under which the pages are held; unique in the server.
        start: a position at a star block's border; what lies between the anchor and it is left out.
        anchor: tokens of the anchor.
    """

    name: str
    start: int
    anchor: int


@dataclass(frozen=True)
class Source:
    """Pages that another replica holds.

    Attributes:
        start: position of the first one's first token.
        pages: their numbers, in order.
        addresses: where each tensor-parallel rank's memory is (scheduler/page_mover.py).
    """

    start: int
    pages: list[int]
    addresses: list[dict[str, Any]]


@dataclass(frozen=True)
class Pull:
    """Pages to fetch before the prefill goes on: sources that follow on one another."""

    sources: tuple[Source, ...]

    def span(self, page: int) -> tuple[int, int]:
        """First position, and the one after the last."""
        last = self.sources[-1]
        return self.sources[0].start, last.start + len(last.pages) * page


@dataclass(frozen=True)
class Share:
    """The plan that was made for the whole prompt, and what this request does of it."""

    plan: list[int] | None
    task: Part | Pull

    def to_wire(self) -> dict[str, Any]:
        return {type(self.task).__name__: asdict(self.task)}


def _wire(request: Any, kind: type) -> dict[str, Any] | None:
    params = request.sampling_params
    share = params.extra_args.get(SHARE_KEY) if params is not None and params.extra_args else None
    return None if share is None else share.get(kind.__name__)


def part_of(request: Any) -> Part | None:
    """The part of a prompt that an engine request prefills for others; None where it is a whole one."""
    wire = _wire(request, Part)
    return None if wire is None else Part(**wire)


def pull_of(request: Any) -> Pull | None:
    """What an engine request fetches from other replicas; None: nothing."""
    wire = _wire(request, Pull)
    return None if wire is None else Pull(tuple(Source(**source) for source in wire["sources"]))
