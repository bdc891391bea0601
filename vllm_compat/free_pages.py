"""The order in which the free pages of a vLLM engine lose what they have cached."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from starling.vllm_compat.kv_pages import Page, PagePool
from starling.vllm_compat.patching import touches


class Retention(IntEnum):
    """Time at which a free page makes room: before others, by its last use, or after others."""

    LOW, NORMAL, HIGH = range(3)


@touches(
    "vllm.v1.core.block_pool.BlockPool.free_block_queue",
    "vllm.v1.core.kv_cache_utils.KVCacheBlock.{prev_free_block, next_free_block}",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.{num_free_blocks, get_all_free_blocks}",
)
class FreePages(FreeKVCacheBlockQueue):
    """vLLM's queue of free pages, with pages at its end that are retained, and make room after all others.

    Pages are sorted by the ``retention`` of their number when they become free. A page that makes room is forgotten.
    Goes when vLLM's pool takes an eviction policy.

    Args:
        pages: the free pages.
        limit: maximum number of retained free pages. Above it, the one that became free first is retained no longer.

    Attributes:
        retention: page number -> retention of the pages that are not NORMAL.
        retained: the pages at the end of the queue, in its order.
    """

    def __init__(self, pages: list[Page], limit: int) -> None:
        super().__init__(pages)
        self.limit = limit
        self.retention: dict[int, Retention] = {}
        self.retained: dict[int, Page] = {}

    @classmethod
    def of(cls, pool: PagePool, share: float) -> FreePages:
        """Put such a queue in place of a pool's own; ``share`` of the pages may be retained."""
        pages = pool.block_pool.free_block_queue.get_all_free_blocks()
        pool.block_pool.free_block_queue = queue = cls(pages, int(share * pool.num_pages))
        return queue

    def retain(self, pages: Iterable[Page], retention: Retention) -> None:
        """Say of pages that are held when they make room, once they are free."""
        for page in pages:
            if not page.ref_cnt:
                continue
            if retention == Retention.NORMAL:
                self.retention.pop(page.block_id, None)
            else:
                self.retention[page.block_id] = retention

    def forget(self, pages: Iterable[Page]) -> None:
        """Let pages make room by their last use; for a retained one, that is now."""
        for page in pages:
            self.retention.pop(page.block_id, None)
            if page.block_id in self.retained:
                self.remove(page)
                self.append_n([page])

    # vLLM's methods.

    def popleft(self) -> Page:
        page = super().popleft()
        self._reused((page,))
        return page

    def popleft_n(self, n: int) -> list[Page]:
        pages = super().popleft_n(n)
        self._reused(pages)
        return pages

    def remove(self, block: Page) -> None:
        """Remove a page that a prompt has found: it keeps its retention, unless that is LOW."""
        self.retained.pop(block.block_id, None)
        if self.retention.get(block.block_id) == Retention.LOW:
            del self.retention[block.block_id]
        super().remove(block)

    def append(self, block: Page) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[Page]) -> None:
        if not self.retention and not self.retained:
            super().append_n(blocks)
            return
        first, normal, last = self._sorted(blocks)
        self.prepend_n(first)
        self._insert(normal)
        super().append_n(last)
        self.retained.update((page.block_id, page) for page in last)
        while len(self.retained) > self.limit:
            number = next(iter(self.retained))  # the page stays where it is, before those that are retained
            del self.retained[number]
            self.retention.pop(number, None)

    def _sorted(self, pages: Sequence[Page]) -> tuple[list[Page], list[Page], list[Page]]:
        """Split pages into those with LOW, NORMAL and HIGH retention. A page without content is NORMAL."""
        groups: tuple[list[Page], list[Page], list[Page]] = [], [], []
        for page in pages:
            known = self.retention.get(page.block_id, Retention.NORMAL)
            groups[Retention.NORMAL if page.block_hash is None else known].append(page)
        return groups

    def _insert(self, pages: Sequence[Page]) -> None:
        """Put pages before those that are retained."""
        if not self.retained:
            super().append_n(list(pages))
            return
        after = self.retained[next(iter(self.retained))]
        before = after.prev_free_block
        for page in pages:
            before.next_free_block, page.prev_free_block = page, before
            before = page
        before.next_free_block, after.prev_free_block = after, before
        self.num_free_blocks += len(pages)

    def _reused(self, pages: Collection[Page]) -> None:
        """Forget pages that make room."""
        if self.retention or self.retained:
            for page in pages:
                self.retention.pop(page.block_id, None)
                self.retained.pop(page.block_id, None)
