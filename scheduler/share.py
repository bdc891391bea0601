"""What goes to an engine with one request's part of a prompt that several replicas prefill.

The front that splits the prompt (engine_ext/spreading.py) makes these, the scheduler and the KV connector of each
replica read them from the request's ``extra_args``. Clients can't: a `Share` is no JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SHARE_KEY = "starling_share"
SHARDS = "shards"  # in the connector's configuration: over how many replicas a prompt's KV may be shared out by default
LOST = "starling_lost"  # why a request has ended with an error, in its kv_transfer_params
CONNECTOR = "StarConnector"  # which moves the pages between replicas: engine_ext/star_connector.py


def default_shards(vllm_config: Any) -> int:
    """Over how many replicas the KV of a prompt may be shared out by default; 1: not at all."""
    transfer = vllm_config.kv_transfer_config
    return 1 if transfer is None else transfer.kv_connector_extra_config.get(SHARDS, 1)


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
class Shard:
    """Whole pages of a prompt that another replica holds, and attends to where they are.

    Attributes:
        name: under which it holds them.
        start: position of the first one's first token.
        tokens: how many tokens they have.
        addresses: where each tensor-parallel rank is asked (engine_ext/shard_holder.py).
    """

    name: str
    start: int
    tokens: int
    addresses: list[dict[str, Any]]


@dataclass(frozen=True)
class Attend:
    """Run a prompt of which this replica holds the start only.

    Attributes:
        own: the name under which it holds that.
        shards: the rest, up to the context's last whole page; they follow on one another.
    """

    own: str
    shards: tuple[Shard, ...]

    def span(self) -> tuple[int, int]:
        """First position that is elsewhere, and the one after the last."""
        return self.shards[0].start, self.shards[-1].start + self.shards[-1].tokens


@dataclass(frozen=True)
class Share:
    """The plan that was made for the whole prompt, and what this request does of it."""

    plan: list[int] | None
    task: Part | Pull | Attend

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


def attend_of(request: Any) -> Attend | None:
    """Where the rest of an engine request's prompt is; None: it is all here, or will be."""
    wire = _wire(request, Attend)
    return None if wire is None else Attend(wire["own"], tuple(Shard(**shard) for shard in wire["shards"]))
