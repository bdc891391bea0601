"""What `starling doctor` says of the attention: the backend, and the op that runs."""

from __future__ import annotations

from typing import Any

from starling.config.entry import GPU_ATTENTION


def attention_backend(config: Any) -> dict[str, str]:
    """The attention backend, and why it is used."""
    from starling.attention_backends.paged.names import NAME
    from starling.attention_backends.star.backend import WRAPPED
    from starling.features.star.rules import is_attamba

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
    """The mode of CUDA graphs that the engine will have, as far as its full-attention layers limit it, and why."""
    from starling.attention_backends.star.backend import graph_support
    from starling.features.documents.rules import is_made_for_documents
    from starling.features.star.rules import is_attamba, star_refusals
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


SAMPLES = {"decode, 1k keys": (1, 1024), "decode, 32k keys": (1, 32_768), "prefill of 2,048 tokens": (2048, 32_768)}


GPU_KERNELS = {"triton": "Starling's Triton kernels", "xformers": "xformers' kernels"}


def attention_op(config: Any, cpu_attention: str, gpu_attention: str) -> dict[str, str]:
    """The attention op of some batches, and why it is used; the settings are the options of these names."""
    from starling.attention_backends.kernels.cpu.build import compiler
    from starling.attention_backends.kernels.cpu.selection import Processor, select_op
    from starling.features.cpu_attention_rules import unread_isa
    from starling.features.documents.rules import document_refusals
    from starling.features.star.rules import is_attamba

    on_cpu = config.device_config.device_type == "cpu"
    if is_attamba(config):
        kinds = "C++ ops" if compiler() else "torch code: there is no C++ compiler"
        return {"name": "Starling's", "why": f"Attamba's layers run Starling's {kinds if on_cpu else 'Triton kernels'}"}
    if not on_cpu and gpu_attention in GPU_KERNELS:
        return {"name": GPU_KERNELS[gpu_attention], "why": f"{GPU_ATTENTION}={gpu_attention} selects them"}
    if not on_cpu:
        why = "on GPUs the backend's own kernels run, also for star rows"
        if not document_refusals(config):
            why += "; tokens behind blocks with positions of their own have Starling's Triton kernels"
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
