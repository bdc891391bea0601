"""Metadata of a request beside vLLM's own parameters: its star plan, and its task in a split prefill.

The front puts a RequestMetadata into the ``extra_args`` of a request's sampling parameters. It travels as plain lists
and dicts, and each process decodes it once, at its first use. Clients can't send it: the front refuses the key.

One prompt may be split over several replicas. Then each replica gets a request for its part of the prompt, and the
replica of the first part also gets the whole request, which fetches the other parts' pages or attends to them where
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from starling.scheduler.planning.plan import StarPlan

KEY = "starling"
"""The key in ``extra_args``."""

LOST = "starling_lost"
"""The key in an output's kv_transfer_params that says why its request could not go on."""

SOURCES = "starling_sources"
"""The key in an output's kv_transfer_params that says where its prompt's documents came from."""

CONNECTOR = "StarConnector"
"""The KV connector that moves pages between replicas: features/replicas/connector.py."""

LIBRARY_CONNECTOR = "LibraryConnector"
"""The KV connector that moves pages to and from the library: features/library/connector.py."""

BOTH_CONNECTORS = "LibraryAndReplicasConnector"
"""The KV connector of an engine with a library and replicas: features/library/beside_replicas.py."""

REPLICA_CONNECTORS = (CONNECTOR, BOTH_CONNECTORS)
LIBRARY_CONNECTORS = (LIBRARY_CONNECTOR, BOTH_CONNECTORS)
OWN_CONNECTORS = (CONNECTOR, LIBRARY_CONNECTOR, BOTH_CONNECTORS)

SHARDS = "shards"
"""The key in the connector's configuration: over how many replicas a prompt's KV is divided by default."""

ONE_HOST = "one_host"
"""The key in the connector's configuration: whether all replicas are on one host."""


@dataclass(frozen=True)
class PromptPart:
    """Prefill the prompt's tokens from ``start`` on, and hold their pages until they are released.

    Attributes:
        name: under which the pages are held; unique in the server.
        start: a position at a star block's border; the tokens between the anchor and ``start`` are left out.
        anchor_size: tokens of the anchor.
    """

    name: str
    start: int
    anchor_size: int


@dataclass(frozen=True)
class PageSource:
    """Pages that another replica holds.

    Attributes:
        start: position of the first page's first token.
        page_ids: in the order of their tokens.
        addresses: where the memory of each tensor-parallel rank is (features/replicas/page_transfer.py).
        hold: the number under which the replica holds them (features/replicas/page_transfer.py).
    """

    start: int
    page_ids: list[int]
    addresses: list[dict[str, Any]]
    hold: int


@dataclass(frozen=True)
class PageFetch:
    """Pages to fetch before the prefill goes on.

    Attributes:
        sources: each begins where the one before it ends.
    """

    sources: tuple[PageSource, ...]

    def span(self, page_size: int) -> tuple[int, int]:
        """First position of the pages, and the one after their last."""
        last = self.sources[-1]
        return self.sources[0].start, last.start + len(last.page_ids) * page_size


@dataclass(frozen=True)
class Shard:
    """Whole pages of a prompt that another replica holds, and attends to where they are.

    Attributes:
        name: under which that replica holds them.
        start: position of the first page's first token.
        num_tokens: tokens in the pages.
        addresses: where each tensor-parallel rank takes queries (features/replicas/remote_attention_server.py).
    """

    name: str
    start: int
    num_tokens: int
    addresses: list[dict[str, Any]]


@dataclass(frozen=True)
class RemoteShards:
    """The KV of a prompt of which this replica holds the start only.

    Attributes:
        local_name: the name under which this replica holds the start.
        shards: the rest, up to the context's last whole page. Each shard begins where the one before it ends.
    """

    local_name: str
    shards: tuple[Shard, ...]

    def span(self) -> tuple[int, int]:
        """First position that is on another replica, and the one after the last."""
        last = self.shards[-1]
        return self.shards[0].start, last.start + last.num_tokens


@dataclass(frozen=True)
class RequestMetadata:
    """Decisions of the front about one engine request.

    Attributes:
        plan: the plan, or None if the request runs dense.
        part: the part of a prompt that this request prefills for another one, or None if it is a whole request.
        fetch: pages that this request fetches, or None.
        remote: KV of this request that stays on other replicas, or None.
        why: as the prompt's Decision has it.
        retention: as the prompt's Decision has it.
        keys: how many keys the prompt attends to, where its model counts them itself; None: the plan says it.
    """

    plan: StarPlan | None = None
    part: PromptPart | None = None
    fetch: PageFetch | None = None
    remote: RemoteShards | None = None
    why: str | None = None
    keys: dict[str, Any] | None = None
    retention: str | tuple[str, ...] | None = None

    @property
    def is_split(self) -> bool:
        """Return whether this is a part of a split prompt, or the whole request behind its parts."""
        return self.part is not None or self.fetch is not None or self.remote is not None

    def to_wire(self) -> dict[str, Any]:
        """Return the metadata as msgpack takes it, without what is None."""
        wire = msgspec.to_builtins(self, builtin_types=(bytes,))
        return {name: value for name, value in wire.items() if value is not None}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> RequestMetadata:
        made = msgspec.convert(wire, cls)
        is_dense = made.plan is not None and len(made.plan.starts) < 2
        return replace(made, plan=None) if is_dense else made


NO_METADATA = RequestMetadata()


def metadata_of(request: Any) -> RequestMetadata:
    """Return the metadata of an engine request, or of vLLM's NewRequestData; decoded once, and kept."""
    params = request.sampling_params
    extra_args = params.extra_args if params is not None else None
    if not extra_args or (found := extra_args.get(KEY)) is None:
        return NO_METADATA
    if not isinstance(found, RequestMetadata):
        found = extra_args[KEY] = RequestMetadata.from_wire(found)
    return found


def default_num_shards(vllm_config: Any) -> int:
    """Over how many replicas the KV of a prompt is divided by default; 1: it is not divided."""
    transfer = vllm_config.kv_transfer_config
    return 1 if transfer is None else transfer.kv_connector_extra_config.get(SHARDS, 1)
