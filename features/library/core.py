"""Hooks that the library's KV connector adds to the scheduler: they load single pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult

from starling.config.entry import StarlingConfig
from starling.features.reuse.core import BlockReuse
from starling.scheduler.cache_keys import independent_plan
from starling.scheduler.part import CorePart
from starling.scheduler.planning.request_metadata import metadata_of
from starling.scheduler.provenance import MEMORY, Provenance
from starling.vllm_compat.kv_pages import CacheGroup, Page
from starling.vllm_compat.offloading import PageLoad, PageOffloading
from starling.vllm_compat.scheduler_view import SchedulerView

logger = init_logger("vllm.starling")

MAX_STARTING = 4
"""Most requests that wait for pages before they start; the library is asked for others when these have started."""

PATIENCE_SECONDS = 10.0
"""Seconds without an arriving page after which a request computes the pages that it waits for."""


@dataclass
class Wanted:
    """The pages for which a request waits.

    Attributes:
        pages: their numbers in the prompt, ascending.
        since: when the last page arrived or was found to be missing.
    """

    request: Any
    pages: list[int]
    since: float


class PageLoads(CorePart):
    """Loads of pages for the star requests of one scheduler.

    Args:
        group: the only KV cache group.
        library: vLLM's offloading connector.
        max_pages: how many pages may be on their way at once.
    """

    def __init__(
        self,
        view: SchedulerView,
        group: CacheGroup,
        library: PageOffloading,
        max_pages: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = view
        self.group = group
        self.library = library
        self.max_pages = max_pages
        self.clock = clock
        self.wanted: dict[str, Wanted] = {}
        self.loading: dict[bytes, Page] = {}
        self.arrived: dict[int, tuple[bytes, str, str]] = {}  # page -> its hash, who asked for it, where it was
        library.on_loaded = self._end

    def takes(self, request: Any) -> bool:
        """Return whether a request's pages are asked for here, one by one, and not by vLLM as a prefix."""
        return independent_plan(request) is not None and self.view.may_hit(request)

    def fetches(self, request: Any) -> bool:
        """Return whether a request takes pages of other replicas in place of the library's."""
        metadata = metadata_of(request)
        return metadata.fetch is not None or metadata.remote is not None

    def may_start(self, request: Any, num_computed_tokens: int) -> bool:
        """Return whether a waiting request may start with the tokens found in the prefix cache, else ask again."""
        wanted = self.wanted.get(request.request_id)
        if wanted is None:
            starting = (entry.pages and not entry.request.num_computed_tokens for entry in self.wanted.values())
            if sum(map(bool, starting)) >= MAX_STARTING:
                return False
            first, last = num_computed_tokens // self.group.page_size, (request.num_tokens - 1) // self.group.page_size
            wanted = Wanted(request, self._pages_of(request, first, last), self.clock())
            self.wanted[request.request_id] = wanted
            # vLLM has found these pages and does not hold them yet: else a load could take one of them.
            found = [self.view.pool.find(page_hash, self.group.index) for page_hash in request.block_hashes[:first]]
            hits = [page for page in found if page is not None]
            self.view.pool.hold(hits)
            self._ask(wanted)
            self.view.pool.release(reversed(hits))
        return not wanted.pages or wanted.pages[0] * self.group.page_size > num_computed_tokens

    def _pages_of(self, request: Any, first: int, last: int) -> list[int]:
        """Return the pages ``[first, last)`` of a prompt, without those that a split prompt leaves to others."""
        part = metadata_of(request).part
        left_out = range(0) if part is None else range(part.anchor_size, part.start)
        return [page for page in range(first, last) if page * self.group.page_size not in left_out]

    @property
    def is_waited_for(self) -> bool:
        """Return whether a request waits for pages that are on their way."""
        return any(wanted.pages for wanted in self.wanted.values())

    def before_step(self) -> None:
        """Ask the library for pages, and load those that it has."""
        for request_id, wanted in list(self.wanted.items()):
            if wanted.request.is_finished() or not self.library.knows(wanted.request):
                del self.wanted[request_id]
            elif wanted.pages:
                self._ask(wanted)
            elif wanted.request.num_computed_tokens:
                del self.wanted[request_id]

    def pages_freed(self, request: Any) -> None:
        """Forget the pages that a request waits for; if it starts again, it asks for all of them."""
        self.wanted.pop(request.request_id, None)

    def source_of(self, page: Page, request_id: str) -> str:
        """Return the kind (provenance.py) of a page that a request takes from the prefix cache.

        If the request has asked the library for the page, it is the tier that had the page.
        """
        page_hash, asked, kind = self.arrived.get(page.block_id, (b"", "", MEMORY))
        if asked != request_id or not self.view.pool.holds(page, page_hash, self.group.index):
            return MEMORY
        del self.arrived[page.block_id]
        return kind

    def bound(self, request: Any, start: int, num_tokens: int) -> int:
        return self._before_coming(request, start, num_tokens) or num_tokens

    def refuses(self, request: Any, start: int, num_tokens: int) -> bool:
        """Return whether a chunk has to wait for its pages."""
        return not self._before_coming(request, start, num_tokens)

    def _before_coming(self, request: Any, start: int, num_tokens: int) -> int:
        """Return how many of the tokens from ``start`` on come before the first page that is on its way."""
        wanted = self.wanted.get(request.request_id)
        if wanted is None or not wanted.pages:
            return num_tokens
        behind = (page for page in wanted.pages if (page + 1) * self.group.page_size > start)
        coming = next(behind, None)
        return num_tokens if coming is None else min(num_tokens, max(0, coming * self.group.page_size - start))

    def _ask(self, wanted: Wanted) -> None:
        self.library.begin_step()
        request, hashes = wanted.request, wanted.request.block_hashes
        computed = request.num_computed_tokens // self.group.page_size
        room = self.max_pages - len(self.loading)
        found: list[int] = []
        left: list[int] = []
        asked: set[bytes] = set()  # documents that begin alike have pages with the same hash
        for page in wanted.pages:
            page_hash = hashes[page]
            if page < computed or self.view.pool.find(page_hash, self.group.index) is not None:
                continue
            if page_hash in self.loading or page_hash in asked or room <= 0:
                left.append(page)
                continue
            result = self.library.lookup(request, page_hash, self.group.index)
            if result is LookupResult.MISS:
                continue
            asked.add(page_hash)
            room -= 1
            (found if result is LookupResult.HIT else left).append(page)
        left += self._load(request, found)
        now = self.clock()
        if len(left) < len(wanted.pages):
            wanted.since = now
        elif now - wanted.since > PATIENCE_SECONDS:
            logger.warning("%s: %d pages of the library don't arrive: they are computed", request.request_id, len(left))
            left = []
        wanted.pages = sorted(left)

    def _load(self, request: Any, pages: list[int]) -> list[int]:
        """Load as many of these pages of a prompt as there is room for, and return them; the others are computed."""
        pages = pages[: self.view.pool.num_free_pages]
        if pages:
            targets = self.view.pool.take(len(pages))
            hashes = [request.block_hashes[page] for page in pages]
            self.library.load(request, hashes, [target.block_id for target in targets], self.group.index)
            self.loading |= dict(zip(hashes, targets, strict=True))
        return pages

    def _end(self, load: PageLoad) -> None:
        """Put loaded pages into the prefix cache, from which their requests adopt them."""
        targets = [self.loading.pop(page_hash) for page_hash in load.hashes]
        if not load.is_stale:
            for page_hash, target, kind in zip(load.hashes, targets, load.kinds, strict=True):
                self.view.pool.cache(target, page_hash, self.group.page_size, self.group.index)
                self.arrived[target.block_id] = (page_hash, load.request.request_id, kind)
        self.view.pool.release(targets)


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
