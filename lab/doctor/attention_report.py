"""Attention section of `starling doctor`: the backend, the op that runs, and memory that no profile sees."""

from __future__ import annotations

from typing import Any

from starling.config.entry import GPU_ATTENTION

SAMPLES = {"decode, 1k keys": (1, 1024), "decode, 32k keys": (1, 32_768), "prefill of 2,048 tokens": (2048, 32_768)}
GPU_KERNELS = {"triton": "Starling's Triton kernels", "xformers": "xformers' kernels"}
MOST_MULTIPROCESSORS = 256
"""No GPU has more. Partial results are in proportion to their number."""
SPLITS_NONE = "FlashAttention 3 splits no keys in steps with star rows"
MADE_WITH_THE_WEIGHTS = "the tables of angles are made with the weights, and vLLM's profile counts them"


def attention_backend(config: Any) -> dict[str, str]:
    """Return the attention backend, and why it is used."""
    from starling.attention_backends.paged import NAME
    from starling.attention_backends.star.backend import WRAPPED
    from starling.attention_backends.star.refusals import is_attamba

    if is_attamba(config):
        return {"name": "ATTAMBA", "why": "the layers of an Attamba model attend by themselves"}
    if config.device_config.device_type == "cpu":
        return {"name": "CPU_ATTN", "why": "the CPU platform has no other"}
    chosen = config.attention_config.backend
    if chosen is not None:
        own = chosen.name == NAME
        return {"name": chosen.name, "why": f"{GPU_ATTENTION} names it" if own else "--attention-backend names it"}
    return {"name": "automatic", "why": f"vLLM selects it at its start; Star Attention runs on {', '.join(WRAPPED)}"}


def cuda_graphs(config: Any) -> dict[str, str]:
    """Return the mode of CUDA graphs of the engine, as far as its full-attention layers limit it, and why."""
    from starling.attention_backends.star.backend import graph_support
    from starling.attention_backends.star.refusals import is_attamba, is_made_for_documents, star_refusals
    from starling.vllm_compat.config import resolved_graph_mode

    asked = config.compilation_config.cudagraph_mode
    configured = "NONE" if asked is None else asked.name
    if config.device_config.device_type == "cpu":
        return {"mode": "NONE", "why": "there are none on a CPU"}
    if star_refusals(config) or is_attamba(config):
        return {"mode": configured, "why": "cudagraph_mode; vLLM lowers it at its start where the backend needs it"}
    own_positions = is_made_for_documents(config)
    mode = resolved_graph_mode(config, graph_support(own_positions))
    if mode == configured:
        why = "cudagraph_mode"
    elif own_positions:
        why = f"cudagraph_mode is {configured}, and of steps with documents those of decodes alone run in full graphs"
    else:
        why = f"cudagraph_mode is {configured}, and steps with star rows run in no full graph"
    return {"mode": mode, "why": f"{why}; a model of which no part is compiled has no piecewise graphs"}


def attention_op(config: Any, cpu_attention: str, gpu_attention: str) -> dict[str, str]:
    """Return the attention op of some batches, and why it is used; the settings are the options of these names."""
    from starling.attention_backends.kernels.cpu.attention import Processor, select_op
    from starling.attention_backends.kernels.cpu.build import compiler
    from starling.attention_backends.star.refusals import document_refusals, is_attamba, unread_isa

    on_cpu = config.device_config.device_type == "cpu"
    if is_attamba(config):
        kinds = "C++ ops" if compiler() else "torch code: there is no C++ compiler"
        return {"name": "Starling's", "why": f"Attamba's layers run Starling's {kinds if on_cpu else 'Triton kernels'}"}
    if not on_cpu and gpu_attention in GPU_KERNELS:
        return {"name": GPU_KERNELS[gpu_attention], "why": f"{GPU_ATTENTION}={gpu_attention} selects them"}
    if not on_cpu:
        why = "on GPUs the backend's own kernels run, also for star rows"
        if not document_refusals(config):
            why += "; tokens behind documents have Starling's Triton kernels"
        return {"name": "vLLM's", "why": why}
    if cpu_attention == "vllm":
        return {"name": "vLLM's", "why": "cpu_attention=vllm selects it"}
    if compiler() is None:
        return {"name": "vLLM's", "why": "there is no C++ compiler to build Starling's op"}
    if unread_isa(config):
        return {
            "name": "vLLM's",
            "why": "on this processor vLLM lays out bfloat16 keys for AMX, which only its op reads",
        }
    model, parallel = config.model_config, config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    chosen = {
        batch: select_op(Processor.detect(), model.dtype, queries=queries, keys=keys, group=group).value
        for batch, (queries, keys) in SAMPLES.items()
    }
    return chosen | {"why": "the faster op by benchmarks/kernels/cpu_kernels.py, for this processor and dtype"}


def unprofiled_memory(config: Any) -> dict[str, Any]:
    """Return the most that Starling takes of each GPU beside what vLLM's memory profile has seen, and what for.

    vLLM sizes the KV cache by a profile of the weights and of one dense step. ``gpu_memory_utilization`` has to leave
    room for what comes later. ``bytes`` is None on a CPU.
    """
    from starling.attention_backends.star.head_step import CONTIGUOUS_OUTPUT
    from starling.attention_backends.star.refusals import (
        has_dense_heads,
        is_attamba,
        is_made_for_documents,
        star_refusals,
    )

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
    if backend in (None, "FLASH_ATTN"):
        why.append(split_keys(config))
    return {"bytes": sum(found.values()), "why": "; ".join(why)}


def split_keys(config: Any) -> str:
    """Say what FlashAttention 3 takes for the partial results of split keys on a rank, in steps with star rows."""
    mode, model = config.compilation_config.cudagraph_mode, config.model_config
    graph_size = config.compilation_config.max_cudagraph_capture_size or 0
    if mode is None or not mode.has_full_cudagraphs() or not graph_size:
        return SPLITS_NONE
    splits = config.attention_config.flash_attn_max_num_splits_for_cuda_graph
    numbers = splits * graph_size * model.get_num_attention_heads(config.parallel_config) * (model.get_head_size() + 1)
    return (
        f"not counted, as plain vLLM takes it too: {4 * numbers:,} for the keys that FlashAttention 3 splits in a step "
        f"of up to {graph_size:,} tokens; in a longer step with star rows it splits none"
    )


def output_bytes(config: Any) -> int:
    """Return the bytes that the attention of a layer writes on a rank, in a step of the most tokens."""
    model = config.model_config
    heads = model.get_num_attention_heads(config.parallel_config)
    return config.scheduler_config.max_num_batched_tokens * heads * model.get_head_size() * model.dtype.itemsize


def partial_results(config: Any) -> int:
    """Return the most bytes that the kernel of tokens behind documents keeps beside its output, on any GPU."""
    from starling.attention_backends.kernels.triton.attention import rows_that_fill
    from starling.attention_backends.kernels.triton.ranges import PREFILL_LANES, partial_bytes

    model = config.model_config
    kv_heads = model.get_num_kv_heads(config.parallel_config)
    programs = rows_that_fill(MOST_MULTIPROCESSORS, kv_heads)
    return partial_bytes(programs, kv_heads, PREFILL_LANES, model.get_head_size())


def graph_table_bytes(config: Any) -> int:
    """Return the bytes of the table of an engine's full CUDA graphs, where it has such graphs."""
    from starling.attention_backends.kernels.ranges import packed_size
    from starling.attention_backends.star.range_attention import MAX_RANGES

    mode = config.compilation_config.cudagraph_mode
    has_graphs = mode is not None and mode.has_full_cudagraphs()
    return 4 * packed_size(config.scheduler_config.max_num_seqs, MAX_RANGES) if has_graphs else 0


def page_list_bytes(config: Any) -> int:
    """Return the bytes by which FlashInfer's list of pages is longer in an engine that may have star rows."""
    from starling.attention_backends.star.backend import virtual_bounds
    from starling.vllm_compat.config import page_size_before_start

    page_size, longest = page_size_before_start(config), config.model_config.max_model_len
    _, pages = virtual_bounds(config.scheduler_config, longest, page_size)
    return 4 * (pages - config.scheduler_config.max_num_seqs * -(-longest // page_size))


def decode_step(num_tokens: int, cache: dict[str, Any]) -> dict[str, Any]:
    """Return what a step reads for the next token behind a prompt, which sees all: dense, star and with documents.

    Args:
        cache: result of ``kv_cache`` of command.py; no Attamba's, whose tokens do not see all keys.
    """
    return {"keys": num_tokens, "bytes": num_tokens * cache["bytes_per_token"]}
