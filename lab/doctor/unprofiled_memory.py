"""What `starling doctor` says of GPU memory that vLLM's memory profile does not see."""

from __future__ import annotations

from typing import Any

MOST_MULTIPROCESSORS = 256
"""No GPU has more. Partial results are in proportion to their number."""

MADE_WITH_THE_WEIGHTS = "the tables of angles are made with the weights, and vLLM's profile counts them"


def unprofiled_memory(config: Any) -> dict[str, Any]:
    """The most that Starling takes of each GPU beside what vLLM's memory profile has seen, and what for.

    vLLM sizes the KV cache by a profile of the weights and of one dense step. ``gpu_memory_utilization`` has to leave
    room for what comes later. ``bytes`` is None on a CPU.
    """
    from starling.attention_backends.star.head_calls import CONTIGUOUS_OUTPUT
    from starling.features.asked import has_dense_heads
    from starling.features.documents.rules import is_made_for_documents
    from starling.features.star.rules import is_attamba, star_refusals

    if config.device_config.device_type == "cpu":
        return {"bytes": None, "why": "on a CPU vLLM has no memory profile"}
    if star_refusals(config) or is_attamba(config):
        return {"bytes": 0, "why": "no prompt runs star"}
    chosen = config.attention_config.backend
    backend = None if chosen is None else chosen.name
    found = {}
    if backend in (None, "FLASHINFER"):
        found["the page lists of star rows, with FlashInfer"] = page_list_bytes(config)
    if is_made_for_documents(config):
        found["partial results of tokens behind documents, while a layer attends"] = partial_results(config)
        found["the table of decode steps in full CUDA graphs"] = graph_table_bytes(config)
    elif has_dense_heads(config) and (backend is None or backend in CONTIGUOUS_OUTPUT):
        found["a copy of a layer's attention, where heads see different keys"] = output_bytes(config)
    why = [f"{num_bytes:,}: {what}" for what, num_bytes in found.items()] or ["star rows take no more than dense rows"]
    if is_made_for_documents(config):
        why.append(MADE_WITH_THE_WEIGHTS)
    return {"bytes": sum(found.values()), "why": "; ".join(why)}


def output_bytes(config: Any) -> int:
    """What the attention of a layer writes on a rank, in a step of the most tokens."""
    model = config.model_config
    heads = model.get_num_attention_heads(config.parallel_config)
    return config.scheduler_config.max_num_batched_tokens * heads * model.get_head_size() * model.dtype.itemsize


def partial_results(config: Any) -> int:
    """The most that the kernel of tokens behind documents keeps beside its output, on any GPU."""
    from starling.attention_backends.kernels.triton.decode import rows_that_fill
    from starling.attention_backends.kernels.triton.ranges import PREFILL_LANES, partial_bytes

    model = config.model_config
    kv_heads = model.get_num_kv_heads(config.parallel_config)
    programs = rows_that_fill(MOST_MULTIPROCESSORS, kv_heads)
    return partial_bytes(programs, kv_heads, PREFILL_LANES, model.get_head_size())


def graph_table_bytes(config: Any) -> int:
    """What the table of an engine's full CUDA graphs takes, where it has such graphs."""
    from starling.attention_backends.kernels.ranges import packed_size
    from starling.attention_backends.star.graph_ranges import MAX_RANGES

    mode = config.compilation_config.cudagraph_mode
    has_graphs = mode is not None and mode.has_full_cudagraphs()
    return 4 * packed_size(config.scheduler_config.max_num_seqs, MAX_RANGES) if has_graphs else 0


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
    return {"keys": num_tokens, "bytes": num_tokens * cache["bytes_per_token"]}
