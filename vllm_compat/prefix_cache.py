"""The prefix cache of an engine core: page hashes, the hasher of its requests, and its statistics.

Imported in an engine core where Starling is activated, and not before: it imports vLLM's scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine import core

from starling.vllm_compat.patching import Original, touches, wrap

Hasher = Callable[[Any], list[Any]]
HashFunction = Callable[[Any], bytes]


PageKeys = Callable[[Any, int, int], tuple[tuple[str, str], ...]]

_page_keys: list[PageKeys] = []


def add_page_keys(page_keys: PageKeys) -> None:
    """Let ``page_keys(request, start, end)`` add tagged extra keys to the hash of a page, in all engines of a process.

    In place of vLLM's own function for extra keys, in the two modules that call it, so that page hashes
    and KV events agree. Only called in an engine core where Starling is activated. Goes when vLLM has a
    hook for extra keys.
    """

    @wrap(kv_cache_utils, "generate_block_hash_extra_keys")
    @wrap(block_pool, "generate_block_hash_extra_keys")
    def generate_block_hash_extra_keys(original: Original, request: Any, start: int, end: int, mm_index: int) -> Any:
        keys, next_index = original(request, start, end, mm_index)
        added = [key for page_keys in _page_keys for key in page_keys(request, start, end)]
        return ((*(keys or ()), *added) if added else keys), next_index

    if page_keys not in _page_keys:
        _page_keys.append(page_keys)


def extra_page_keys(request: Any, start: int, end: int) -> Any:
    """Return vLLM's extra keys (LoRA, salt, images) of a request's page over ``[start, end)``, and the added ones."""
    return kv_cache_utils.generate_block_hash_extra_keys(request, start, end, 0)[0]


def without_salt(extra_keys: Any) -> Any:
    """Return the extra keys of a page without the salt, which vLLM gives to a prompt's first page alone."""
    return tuple(key for key in extra_keys or () if key[0] != "cache_salt") or None


def hash_page(hash_function: HashFunction, parent: Any, token_ids: Any, extra_keys: Any) -> Any:
    """Return vLLM's hash of a page of tokens that follows the page whose hash is ``parent``."""
    return kv_cache_utils.hash_block_tokens(hash_function, parent, token_ids, extra_keys)


def plain_request_hasher(page_size: int, hash_function: HashFunction) -> Hasher:
    """Return vLLM's own hasher: from a request to the hashes of its pages that were completed since the last call."""
    return kv_cache_utils.get_request_block_hasher(page_size, hash_function)


_make_hasher: Callable[[int, HashFunction], Hasher] | None = None


def use_request_hasher(make: Callable[[int, HashFunction], Hasher] | None) -> None:
    """Let the engine core that is being made hash its requests' pages by ``make(page_size, hash_function)``.

    EngineCore makes its hasher right after its scheduler, and calls it where requests come in, beside the steps.
    Called while the scheduler is made, each time. Goes when a scheduler can bring a hasher.

    Where keys also cover tokens behind their page (speculative decoding since vLLM 0.33), the hasher stays vLLM's:
    Starling has no use for its own there, since star blocks are not reused behind a gap.

    Args:
        make: None for vLLM's own.
    """

    @wrap(core, "get_request_block_hasher")
    def get_request_block_hasher(
        original: Original, page_size: int, hash_function: HashFunction, *num_tokens_behind: int
    ) -> Any:
        if _make_hasher is None or any(num_tokens_behind):
            return original(page_size, hash_function, *num_tokens_behind)
        return _make_hasher(page_size, hash_function)

    global _make_hasher
    _make_hasher = make


@touches(
    "vllm.v1.engine.core.{PrefixHashConfig, frontend_block_hashes}",
    "vllm.v1.engine.EngineCoreRequest.block_hashes",
    since="0.34",
)
def hash_prompts_in_core(has_own_keys: Callable[[Any], bool]) -> None:
    """Let the engine cores of this process hash all prompts themselves.

    Since vLLM 0.34 an engine core offers its fronts to hash prompts, and takes the hashes that they send in
    EngineCoreRequest.block_hashes. A front knows neither the added keys nor the padding of documents, so by its hashes
    a prompt would find pages of other content. The offer is withheld, and without it vLLM leaves the hashes of a front
    unused. Only called in an engine core where Starling is activated. Goes when a front's hashes can have added keys.

    Args:
        has_own_keys: tells of an EngineCoreRequest whether its pages have keys that no front can make. With hashes such
            a request is refused.
    """
    if not hasattr(core, "frontend_block_hashes"):
        return

    @wrap(core, "PrefixHashConfig")
    def no_offer(original: Original, *args: Any, **kwargs: Any) -> None:
        return None

    @wrap(core, "frontend_block_hashes")
    def frontend_block_hashes(original: Original, request: Any, offer: Any) -> Any:
        if request.block_hashes is not None and has_own_keys(request):
            raise VLLMValidationError(
                f"block_hashes has {len(request.block_hashes)} hashes of a prompt with star blocks or documents, whose "
                "pages have other keys. Allowed: none for such prompts.",
                parameter="block_hashes",
            )
        return original(request, offer)


@touches("vllm.v1.core.kv_cache_manager.KVCacheManager.get_num_cached_tokens", since="0.34")
def count_cached_tokens(manager: Any, count: Callable[[Any], int | None]) -> None:
    """Let a KV cache manager count what requests have in the prefix cache, by which vLLM orders those that wait.

    Since vLLM 0.34, --cache-aware-admission-window puts the requests with the longest cached prefix first. It does not
    see pages behind a prompt's first missing one. Goes when a scheduler can count them itself.

    Args:
        manager: vLLM's KVCacheManager.
        count: called with a Request; returns None to leave the count to vLLM.
    """
    original = getattr(manager, "get_num_cached_tokens", None)
    if original is None:
        return

    def get_num_cached_tokens(request: Any) -> int:
        counted = count(request)
        return original(request) if counted is None else counted

    manager.get_num_cached_tokens = get_num_cached_tokens


def leave_out_of_hit_rate(is_left_out: Callable[[Any], bool]) -> None:
    """Keep requests out of vLLM's prefix-cache hit rate: the tokens that a part of a prompt leaves out are no hit.

    Only called in an engine core where Starling is activated. Goes when a request can say so.
    """

    @wrap(KVCacheManager, "record_prefix_cache_stats")
    def record_prefix_cache_stats(original: Original, self: Any, request: Any, num_hits: int) -> None:
        if not is_left_out(request):
            original(self, request, num_hits)
