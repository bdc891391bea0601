"""Configurations with vLLM's field names, as far as Starling's rules read them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.config import CUDAGraphMode


def drafting(method, **changes):
    return SimpleNamespace(**{"method": method, "enable_adaptive_verification": False} | changes)


def fake_config(**changes):
    """A configuration that no rule refuses, with changes by owner__attribute."""
    model = SimpleNamespace(
        model="a model without files",
        revision=None,
        runner_type="generate",
        is_encoder_decoder=False,
        use_mla=False,
        is_attention_free=False,
        hf_text_config=SimpleNamespace(layer_types=["sliding_attention", "full_attention"]),
        get_sliding_window=lambda: 128,
        uses_alibi=False,
        is_mm_prefix_lm=False,
        rswa_window=None,
        is_diffusion=False,
        is_hybrid=False,
        max_model_len=8192,
        enable_sleep_mode=False,
        enable_cumem_allocator=False,
        get_vocab_size=lambda: 320,
    )
    parallel = SimpleNamespace(
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        use_ubatching=False,
        data_parallel_size=1,
        data_parallel_external_lb=False,
        data_parallel_hybrid_lb=False,
        pipeline_parallel_size=1,
        enable_elastic_ep=False,
        enable_fault_tolerance=False,
        data_parallel_backend="mp",
        distributed_executor_backend="mp",
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        speculative_config=None,
        lora_config=None,
        cache_config=SimpleNamespace(
            kv_sharing_fast_prefill=False,
            use_replayssm=False,
            enable_prefix_caching=True,
            num_gpu_blocks=None,
            effective_attention_block_size=None,
        ),
        kv_transfer_config=None,
        aux_output_config=SimpleNamespace(enabled=False),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, static_forward_context={}),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    for name, value in changes.items():
        owner, _, attribute = name.partition("__") if "__" in name else ("", "", name)
        setattr(getattr(config, owner) if owner else config, attribute, value)
    return config


# Two replicas of a model whose prompts are split.
FULL = {
    "additional_config": {},
    "parallel_config__data_parallel_size": 2,
    "model_config__hf_text_config": SimpleNamespace(model_type="llama", layer_types=None),
    "model_config__get_sliding_window": lambda: None,
}

# The same on a CPU, where KV may stay on its replica.
CPU = FULL | {
    "device_config__device_type": "cpu",
    "cache_config__cache_dtype": "auto",
    "cache_config__block_size": 128,
    "scheduler_config__async_scheduling": False,
    "parallel_config___api_process_count": 1,
    "model_config__dtype": torch.float32,
    "model_config__get_head_size": lambda: 64,
    "additional_config": {"starling": {}},
}
