"""Hooks that the library's KV connector adds to the scheduler: they load single pages (page_loads.py)."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from starling.config.entry import StarlingConfig
from starling.features.reuse.core import BlockReuse
from starling.scheduler.part import CorePart
from starling.scheduler.provenance import Provenance


@runtime_checkable
class LoadsPages(Protocol):
    """A KV connector that loads single pages: connector.py."""

    def make_page_loads(self, view: Any, group: Any) -> Any: ...


def part_of_connector(scheduler: Any, config: StarlingConfig) -> CorePart | None:
    """Return the hooks that load pages, if blocks are reused; they also know where pages came from."""
    if scheduler.part(BlockReuse) is None or not isinstance(scheduler.connector, LoadsPages):
        return None
    loads: Any = scheduler.connector.make_page_loads(scheduler.view, scheduler.view.only_group)
    scheduler.part(Provenance).source_of = loads.source_of
    return loads


PARTS = (part_of_connector,)
