"""Makes vLLM's own FlashInfer builder, plain and wrapped, and prints the sizes of its buffers as JSON, case by case.

Run as a process of its own. The device is torch's "meta", which takes no memory.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from tests.unit.gpu.cuda_process import become_cuda


def make_scheduler_config(max_num_seqs: int, max_num_batched_tokens: int) -> SimpleNamespace:
    return SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def buffer_sizes(max_num_seqs: int, max_num_batched_tokens: int, page_size: int, max_model_len: int) -> dict:
    """The sizes for one configuration; to be called after ``become_cuda``."""
    import torch
    from vllm.config import CUDAGraphMode, set_current_vllm_config
    from vllm.v1.attention.backends import flashinfer
    from vllm.v1.attention.backends.utils import PerLayerParameters
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from starling.attention_backends.star.backend import make_star_backend

    flashinfer.get_per_layer_parameters = lambda *_: {"layer": PerLayerParameters(-1, None, 0.1)}
    flashinfer.get_num_attention_heads_from_layers = lambda *_: 8
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len, dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        attention_config=SimpleNamespace(disable_flashinfer_q_quantization=True, use_trtllm_attention=False),
        scheduler_config=make_scheduler_config(max_num_seqs, max_num_batched_tokens),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL, max_cudagraph_capture_size=512),
        parallel_config=SimpleNamespace(
            cp_kv_cache_interleave_size=1, dcp_comm_backend="ag_rs", decode_context_parallel_size=1
        ),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    spec = FullAttentionSpec(block_size=page_size, num_kv_heads=1, head_size=128, dtype=torch.bfloat16)
    sizes = {}
    for name, backend in (
        ("plain", flashinfer.FlashInferBackend),
        ("star", make_star_backend(flashinfer.FlashInferBackend)),
    ):
        with set_current_vllm_config(config):
            builder = backend.get_builder_cls()(spec, ["layer"], config, torch.device("meta"))
        sizes[name] = {
            "rows": len(builder.paged_kv_last_page_len.np),
            "row_starts": len(builder.paged_kv_indptr.np),
            "pages": len(builder.paged_kv_indices),
        }
    sizes["configured"] = {
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
    }
    return sizes


if __name__ == "__main__":
    become_cuda()
    print(json.dumps([buffer_sizes(*case) for case in json.loads(sys.argv[1])]))
