"""The pages of a vLLM engine's KV cache, and the groups of layers that share them.

A page here is vLLM's KVCacheBlock, and ``num_pages`` leaves out the pool's null page, which holds nothing. All of this
goes when vLLM has an API for its block pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import get_group_id, make_block_hash_with_group_id

from starling.vllm_compat.patching import touches

Page = Any
"""A vLLM KVCacheBlock."""


@touches(
    "vllm.v1.core.block_pool.BlockPool.{num_gpu_blocks, get_num_free_blocks, null_block, blocks, get_cached_block}",
    "vllm.v1.core.block_pool.BlockPool.{cached_block_hash_to_block, touch, free_blocks, get_new_blocks}",
    "vllm.v1.core.block_pool.BlockPool._insert_block_hash",
    "vllm.v1.core.block_pool.BlockHashToBlockMap._cache",
    "vllm.v1.core.kv_cache_utils.KVCacheBlock.{ref_cnt, is_null, block_id, block_hash}",
)
class PagePool:
    """The pages of one engine: a vLLM BlockPool."""

    def __init__(self, block_pool: Any) -> None:
        self.block_pool = block_pool

    @property
    def num_pages(self) -> int:
        return self.block_pool.num_gpu_blocks - 1

    @property
    def num_free_pages(self) -> int:
        """Return the number of pages that no request holds; some have content that a prompt can still hit."""
        return self.block_pool.get_num_free_blocks()

    @property
    def null_page(self) -> Page:
        """Return the page for where a request has none: it takes no memory, has no hash, and may be held for ever."""
        return self.block_pool.null_block

    def find(self, page_hash: Any, group: int = 0) -> Page | None:
        """Return the page of a KV cache group that is cached under this hash, or None if there is none."""
        found = self.block_pool.get_cached_block(page_hash, [group])
        return None if found is None else found[0]

    def are_cached(self, page_hashes: Iterable[Any], group: int = 0) -> list[bool]:
        """Return, for each hash, whether a page of a KV cache group is cached under it.

        Any thread may call this while the engine makes steps: each answer is one look into a dict. ``find`` is for the
        scheduler's thread alone. Goes when the pool can be asked for a hash without a page.
        """
        cache = self.block_pool.cached_block_hash_to_block._cache
        return [make_block_hash_with_group_id(page_hash, group) in cache for page_hash in page_hashes]

    def holds(self, page: Page, page_hash: Any, group: int = 0) -> bool:
        """Return whether a page has the content of this hash."""
        return bool(page.block_hash == make_block_hash_with_group_id(page_hash, group))

    def find_run(self, page_hashes: Iterable[Any], group: int = 0) -> list[Page]:
        """Return the pages cached under these hashes, up to the first hash that has none."""
        found = []
        for page_hash in page_hashes:
            page = self.find(page_hash, group)
            if page is None:
                break
            found.append(page)
        return found

    def pages(self, page_ids: Iterable[int]) -> list[Page]:
        return [self.block_pool.blocks[page_id] for page_id in page_ids]

    def hold(self, pages: Sequence[Page]) -> None:
        """Keep pages from being freed until they are released once more."""
        self.block_pool.touch(pages)

    def release(self, pages: Iterable[Page]) -> None:
        """Release held pages; the first ones lose their content first when pages are needed."""
        self.block_pool.free_blocks(pages)

    def take(self, number: int) -> list[Page]:
        """Free pages, which are held from now on; what they had cached is forgotten (raises ValueError: too few)."""
        return self.block_pool.get_new_blocks(number)

    def cache(self, page: Page, page_hash: Any, tokens: int, group: int = 0) -> None:
        """Let prompts find a held page of ``tokens`` tokens, unless they find another one under this hash."""
        if self.find(page_hash, group) is None:
            key = make_block_hash_with_group_id(page_hash, group)
            self.block_pool._insert_block_hash(key, page, num_tokens=tokens)

    def cached_free_pages(self) -> Iterator[int]:
        """Yield the KV cache group of each free page that has content. Walks the whole pool."""
        for page in self.block_pool.blocks:
            if page.ref_cnt == 0 and not page.is_null and page.block_hash is not None:
                yield get_group_id(page.block_hash)


@touches(
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.{req_to_blocks, num_cached_block}",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.{block_size, kv_cache_group_id}",
)
@dataclass(frozen=True)
class CacheGroup:
    """One KV cache group: layers whose pages are allocated together.

    Attributes:
        spec: vLLM's KVCacheSpec of the layers.
        manager: vLLM's SingleTypeKVCacheManager.
    """

    layer_names: list[str]
    spec: Any
    manager: Any

    @property
    def page_size(self) -> int:
        """Return the tokens of a page."""
        return self.manager.block_size

    @property
    def index(self) -> int:
        return self.manager.kv_cache_group_id

    def pages(self, request_id: str) -> Sequence[Page]:
        """Return the pages that a request holds, in the order of its tokens, with the null page where it holds none."""
        return self.manager.req_to_blocks.get(request_id, ())

    def num_pages(self, request_id: str) -> int:
        """Return the number of pages that a request holds, null pages left out."""
        return sum(not page.is_null for page in self.pages(request_id))

    def num_held_pages(self) -> int:
        """Return the number of pages that all requests hold; a page that several hold counts once."""
        held = self.manager.req_to_blocks.values()
        return len({page.block_id for pages in held for page in pages if not page.is_null})

    def num_hashed_pages(self, request_id: str) -> int | None:
        """Return the number of a request's leading pages in the prefix cache, or None if it has had no page yet."""
        return self.manager.num_cached_block.get(request_id)
