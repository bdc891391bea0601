"""Run in a process of its own: which CUDA graphs vLLM takes beside Star Attention, and prints a JSON line.

The configurations are those of engines on a GPU, with all that vLLM and Starling do to them. vLLM's own code then
resolves the graph mode of an engine whose layers have a wrapped backend, and picks the graphs of its batches.

The argument is {"model": path, "runner": "V1" or "V2", "options": the server's star options, "graphs": a list of
compilation configurations}. The result is a list with, for each, {"mode", "decode", "mixed", "without", "doctor"}: the
resolved mode, the graphs of a decode batch, of a mixed one, and of a decode batch that must run in no full graph, and
what `starling doctor` says; or {"refused": the message}.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.gpu_contract.cuda_platform import use_cuda_platform

PLATFORM = use_cuda_platform()

import torch  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from starling.attention_backends.star.document_layers import DocumentLayers, HeadLayers  # noqa: E402
from starling.attention_backends.star.refusals import star_refusals  # noqa: E402
from starling.engine_ext.worker.star_worker import register_backends  # noqa: E402
from starling.lab.doctor.doctor import cuda_graphs  # noqa: E402
from starling.vllm_compat.worker import without_full_graphs  # noqa: E402
from tests.model_runners import HAS_V1  # noqa: E402

SPEC = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)


def v1_graphs(config: Any, backend: Any) -> dict[str, str]:
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.vllm_config, runner.compilation_config = config, config.compilation_config
    runner.speculative_config = runner.kv_cache_config = None
    runner.uniform_decode_query_len, runner.max_num_reqs = 1, config.scheduler_config.max_num_seqs
    runner.cudagraph_dispatcher = CudagraphDispatcher(config)
    runner._check_and_update_cudagraph_mode([{backend}], [SimpleNamespace(kv_cache_spec=SPEC)])
    decode, mixed = (runner.cudagraph_dispatcher.dispatch(4, uniform_decode=uniform)[0] for uniform in (True, False))
    with without_full_graphs(runner):
        without = runner.cudagraph_dispatcher.dispatch(4, uniform_decode=True)[0]
    assert runner.cudagraph_dispatcher.dispatch(4, uniform_decode=True)[0] is decode
    mode = config.compilation_config.cudagraph_mode.name
    return {"mode": mode, "decode": decode.name, "mixed": mixed.name, "without": without.name}


def v2_graphs(config: Any, backend: Any, piecewise: bool) -> dict[str, str]:
    """Args: piecewise: whether a part of the model is compiled."""
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.attn_utils import get_attn_cg_support

    builder = backend.get_builder_cls()
    group = SimpleNamespace(backend=backend, kv_cache_spec=SPEC, get_metadata_builder=lambda number: builder)
    found = get_attn_cg_support([[group]], config)
    mode = config.compilation_config.resolve_cudagraph_mode_and_sizes(
        found.min_cg_support,
        found.min_cg_attn_backend,
        1,
        piecewise_capture_available=piecewise,
        **({"use_v2_model_runner": True} if HAS_V1 else {}),
    )
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    with (
        mock.patch.object(cudagraph_utils, "get_pp_group", lambda: rank),
        mock.patch.object(type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda self: None),
    ):
        decodes: Any = 1 if HAS_V1 else {1: config.scheduler_config.max_num_seqs}
        manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), mode, decodes)
    manager._graphs_captured = True
    decode, mixed = manager.dispatch(4, 4, 1, 0), manager.dispatch(2, 4, None, 0)
    with without_full_graphs(SimpleNamespace(cudagraph_manager=manager)):
        without = manager.dispatch(4, 4, 1, 0, max_query_len=1)
    assert manager.dispatch(4, 4, 1, 0) == decode
    modes = {"decode": decode, "mixed": mixed, "without": without}
    return {"mode": mode.name} | {batch: found.cg_mode.name for batch, found in modes.items()}


def graphs_of(model: str, runner: str, options: dict[str, Any], graphs: dict[str, Any]) -> dict[str, str]:
    try:
        config = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            compilation_config=graphs,
            additional_config={"starling": options},
        ).create_engine_config()
    except ValueError as error:
        return {"refused": str(error)}
    doctor = cuda_graphs(config)["mode"]
    documents, heads = DocumentLayers.make(config), HeadLayers.make(config)
    register_backends(config, star_refusals(config), documents.attends_by_parts or heads.attends_by_parts)
    backend = AttentionBackendEnum.TRITON_ATTN.get_class()
    if documents.is_made_for_documents:  # as once a model is loaded
        layer: Any = SimpleNamespace(impl=object.__new__(backend.get_impl_cls()))
        layer.impl.rotation = "a rotation"
        config.compilation_config.static_forward_context["layer"] = layer
    piecewise = config.compilation_config.is_attention_compiled_piecewise()
    found = v1_graphs(config, backend) if runner == "V1" else v2_graphs(config, backend, piecewise)
    return found | {"doctor": doctor}


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps([graphs_of(job["model"], job["runner"], job["options"], graphs) for graphs in job["graphs"]]))
