"""Prefix-cache keys of KV pages under star and with adapters, whose KV depends on more than the tokens before.

vLLM chains page hashes over tokens and "extra keys" (LoRA, salt, images). Star adds one more:

- a page of block 0 has the KV of dense attention: no key, so star and dense requests share it;
- a page of a later block, inside the context, also depends on A, B and O, and on which KV heads are dense;
- the page that holds ``context_end`` and all pages after it attend globally over star-built KV: they also depend on
  ``context_end``.

A chat's next turn has a later ``context_end`` and the same blocks, so it hits all complete context pages.

Where blocks are independent of one another (no overlap, no dense heads), the chain also starts anew at each block, from
the anchor and the block's position: a block between two edited blocks keeps its keys. Where blocks are documents,
it starts from the anchor alone: a document has its keys wherever it stands. The chain of the first query page
continues from the last pages of all blocks, so that its key stands for everything before it.

With a library, whose pages other servers read, pages of a LoRA adapter also have a digest of its files; vLLM has only
the name and path of an adapter in keys. Where files are not known, or have changed since the engine first saw them, the
key is one that no other engine has.
"""

from __future__ import annotations

import hashlib
import itertools
import uuid
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import metadata_of
from starling.vllm_compat.prefix_cache import (
    Hasher,
    HashFunction,
    extra_page_keys,
    hash_page,
    plain_request_hasher,
    without_salt,
)


def page_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Return the extra keys of a request's page over positions ``[start, end)``: one, or none."""
    plan = metadata_of(request).plan
    key = None if plan is None else star_page_key(plan, start, end)
    return () if key is None else (key,)


def star_page_key(plan: StarPlan, start: int, end: int) -> tuple[str, str] | None:
    """Return the extra key of the page over positions ``[start, end)``, tagged like vLLM's, or None if it has none."""
    key = plan.page_key(start, end)
    return None if key is None else ("star", f"star:{key}")


def chain_restarts(plan: StarPlan, page_size: int, start: int) -> Iterator[int]:
    """Yield the pages whose key does not continue that of the page before: the first of later blocks and the query.

    Args:
        start: a position; only pages behind it.
    """
    first_query_page = plan.context_end // page_size
    later = (plan.starts[number] // page_size for number in range(bisect_right(plan.starts, start), len(plan.starts)))
    yield from itertools.takewhile(lambda page: page < first_query_page, later)
    if first_query_page * page_size > start:
        yield first_query_page


def parent_pages(plan: StarPlan, page_size: int, page: int) -> tuple[int, ...] | None:
    """Return the pages whose keys a page's key continues where the chain restarts, or None if it is the page before.

    Pages are counted from the start of the prompt.
    """
    start, first_query_page = page * page_size, plan.context_end // page_size
    if page == first_query_page:
        ends = {page - 1, *(border // page_size - 1 for border in plan.starts if border <= start)}
        return tuple(sorted(ends - {-1}))
    if page > first_query_page or start < plan.head_end or plan.starts[plan.block_of(start)] != start:
        return None
    return (plan.anchor_size // page_size - 1,) if plan.anchor_size else ()


def independent_plan(request: Any) -> StarPlan | None:
    """Return the plan of a request whose star blocks are independent, or None if it has none, or they are not.

    The rotary positions of an image (M-RoPE) depend on the images before it, so prompts with images are left out.
    """
    plan = metadata_of(request).plan
    return None if plan is None or not plan.is_independent or request.mm_features else plan


def independent_block_hasher(page_size: int, hash_function: HashFunction) -> Hasher:
    """Request hasher as vLLM's, with keys whose chain restarts at star blocks that are independent.

    Args:
        page_size: of the only KV cache group; keys are those of whole pages.

    Returns:
        A function from a request to the keys of the pages completed since its last call. It does no work where no page
        was completed, so that a generated token costs nothing.
    """
    plain = plain_request_hasher(page_size, hash_function)

    def hasher(request: Any) -> list[Any]:
        known = request.block_hashes
        first, stop = len(known), request.num_tokens // page_size
        if stop <= first:
            return []
        plan = independent_plan(request)
        if plan is None:
            return plain(request)
        keys: list[Any] = []

        def key_of(page: int) -> Any:
            return known[page] if page < first else keys[page - first]

        for page in range(first, stop):
            start, end = page * page_size, (page + 1) * page_size
            parents, extra = parent_pages(plan, page_size, page), extra_page_keys(request, start, end)
            if parents is None:
                parent = key_of(page - 1) if page else None
            else:  # vLLM has the salt in the first page alone, which the chain of a block without an anchor leaves out
                place = None if plan.documents else start
                parent = hash_function(("star", place, request.cache_salt, tuple(map(key_of, parents))))
                extra = without_salt(extra)  # the first page may be a block, which has its key elsewhere too
            keys.append(hash_page(hash_function, parent, request.all_token_ids[start:end], extra))
        return keys

    return hasher


Files = tuple[tuple[str, int, int], ...]
"""Name, size and time of the last change of each file."""


class AdapterKeys:
    """The key of each adapter, as a part of those of a page. Reads an adapter's files at its first request."""

    def __init__(self) -> None:
        self.mine = uuid.uuid4().hex
        self.first: dict[str, tuple[Files, str]] = {}  # by path
        self.of_requests: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()

    def keys(self, request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
        """Return the keys of a request's page over positions ``[start, end)``, the same for all of its pages."""
        if request.lora_request is None:
            return ()
        if request not in self.of_requests:
            self.of_requests[request] = ("lora", self.key_of(Path(request.lora_request.lora_path)))
        return (self.of_requests[request],)

    def key_of(self, folder: Path) -> str:
        """Return the key of an adapter whose files are in a folder."""
        files = files_in(folder)
        if str(folder) not in self.first:
            self.first[str(folder)] = files, digest(folder, files) if files else self.mine
        first, key = self.first[str(folder)]
        return key if files == first else f"{self.mine} {files}"


def files_in(folder: Path) -> Files:
    """Return the files of a folder; none if it is no folder, as for a name on a hub."""
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def digest(folder: Path, files: Files) -> str:
    """Return the digest of the content of these files of a folder."""
    total = hashlib.sha256()
    for name, size, _ in files:
        total.update(f"{name} {size}\n".encode())
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


_adapters = AdapterKeys()


def adapter_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Return the keys of a request's page for its adapter, the same for all of its pages."""
    return _adapters.keys(request, start, end)
