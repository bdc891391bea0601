"""What `starling doctor` says of GPU memory that vLLM's memory profile does not see."""

from __future__ import annotations

from typing import Any

MADE_WITH_THE_WEIGHTS = "the tables of angles are made with the weights, and vLLM's profile counts them"


def unprofiled_memory(config: Any) -> dict[str, Any]:
    """The most that Starling takes of each GPU beside what vLLM's memory profile has seen, and what for.

    vLLM sizes the KV cache by a profile of the weights and of one dense step. ``gpu_memory_utilization`` has to leave
    room for what comes later. ``bytes`` is None on a CPU.
    """
    from starling.attention_backends.star.head_calls import CONTIGUOUS_OUTPUT
    from starling.engine_ext.refusals import has_dense_heads, is_attamba, is_made_for_documents, star_refusals

    if config.device_config.device_type == "cpu":
        return {"bytes": None, "why": "on a CPU vLLM has no memory profile"}
    if star_refusals(config) or is_attamba(config):
        return {"bytes": 0, "why": "no prompt runs star"}
    chosen = config.attention_config.backend
    backend = None if chosen is None else chosen.name
    found = {}
    if backend in (None, "FLASHINFER"):
        found["the page lists of star rows, with FlashInfer"] = page_list_bytes(config)
    tokens, heads, size, itemsize = query_sizes(config)
    if is_made_for_documents(config):
        what = "the turned queries and the attention of a prefill behind documents, while a layer attends"
        found[what] = turned_bytes(tokens, heads, size, itemsize)
    elif has_dense_heads(config) and (backend is None or backend in CONTIGUOUS_OUTPUT):
        found["a copy of a layer's attention, where heads see different keys"] = tokens * heads * size * itemsize
    why = [f"{num_bytes:,}: {what}" for what, num_bytes in found.items()] or ["star rows take no more than dense rows"]
    if is_made_for_documents(config):
        why.append(MADE_WITH_THE_WEIGHTS)
    return {"bytes": sum(found.values()), "why": "; ".join(why)}


def query_sizes(config: Any) -> tuple[int, int, int, int]:
    """Tokens of a step at most, query heads of a rank, elements of a head, bytes of an element."""
    model = config.model_config
    heads = model.get_num_attention_heads(config.parallel_config)
    return config.scheduler_config.max_num_batched_tokens, heads, model.get_head_size(), model.dtype.itemsize


def turned_bytes(tokens: int, heads: int, size: int, itemsize: int) -> int:
    """The most that the attention of a layer takes for documents in a step of so many tokens, on a GPU.

    Args:
        tokens: query tokens of the step.
        heads, size, itemsize: query heads, elements of a head, bytes of an element.
    """
    from starling.attention_backends.star.turned import MAX_TOKENS

    turned = MAX_TOKENS["cuda"] + tokens  # a call has fewer than the limit, without its first row
    in_turning = 3 * 4 + 2 * itemsize  # the query in float32, its two parts, their join; as it was, and as it becomes
    of_step = 4 + 3 * itemsize  # the output in float32; the query and the output, of these tokens, and what is written
    angles = 3 * 4 * size  # cos and sin of the elements, and the log-sum-exp
    return turned * (heads * size * in_turning + angles) + tokens * heads * size * of_step


def page_list_bytes(config: Any) -> int:
    """By how much FlashInfer's list of pages is longer in an engine that may have star rows."""
    from starling.attention_backends.star.backend import virtual_bounds
    from starling.vllm_compat.config import page_size_before_start

    page_size, longest = page_size_before_start(config), config.model_config.max_model_len
    _, pages = virtual_bounds(config.scheduler_config, longest, page_size)
    return 4 * (pages - config.scheduler_config.max_num_seqs * -(-longest // page_size))


def decode_step(num_tokens: int, cache: dict[str, Any]) -> dict[str, Any]:
    """What a step reads for the next token behind a prompt: it sees all tokens, dense, with star and with documents.

    Args:
        cache: from doctor.py's ``kv_cache``; no Attamba's, whose tokens do not see all keys.
    """
    return {
        "keys": num_tokens,
        "bytes": num_tokens * cache["bytes_per_token"],
        "rows": "1; behind n documents at least n + 1, and its query is turned for each document, in each layer",
    }
