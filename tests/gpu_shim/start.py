"""Makes this process one with a GPU, for vLLM. To be imported before anything else of vLLM."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch

from tests.gpu_contract.cuda_platform import use_cuda_platform
from tests.gpu_shim import cuda
from tests.gpu_shim.device import GPU, PYTHON_OPS, GpuTensor

cuda.install()
PLATFORM = use_cuda_platform()
PLATFORM.dist_backend = "gloo"  # NCCL needs GPUs; there is one rank
PLATFORM.dispatch_key = "CPU"  # of vLLM's operators in Python, which torch's build for CPUs can register
PLATFORM.is_pin_memory_available = classmethod(lambda cls: True)


def _note_python_ops() -> None:
    """Let PYTHON_OPS have vLLM's operators in Python: their code launches kernels, and is none itself."""
    from vllm.utils import torch_utils

    register = torch_utils.direct_register_custom_op

    def noted(op_name: str, op_func: Any, *args: Any, target_lib: Any = None, **kwargs: Any) -> None:
        library = target_lib or torch_utils.vllm_lib
        PYTHON_OPS[f"{library.ns}::{op_name}"] = op_func
        register(op_name, op_func, *args, target_lib=target_lib, **kwargs)

    torch_utils.direct_register_custom_op = noted


def _launch_triton() -> None:
    """Let Triton's interpreter take the tensors of the fake GPU, as one launch."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        GPU.triton.add(f"{executor.fn.__module__}:{executor.fn.__name__}")
        GPU.call(executor.fn.__name__, run, executor, *args, **kwargs)

    GridExecutor.__call__ = call


def _store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: Any,
    dtype: str,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
) -> None:
    """vLLM's reshape_and_cache_flash: write K and V (tokens, KV heads, D) to the slots of tokens that have one."""
    have_one = slots >= 0
    page, place = slots[have_one] // key_cache.shape[1], slots[have_one] % key_cache.shape[1]
    for new, cache, scale in ((keys, key_cache, key_scale), (values, value_cache, value_scale)):
        new = new[: len(slots)][have_one]
        if dtype.startswith("fp8"):  # torch can't index float8 on a CPU
            new, cache = (new / scale).to(torch.float8_e4m3fn).view(torch.uint8), cache.view(torch.uint8)
        cache[page, place] = new


def _leave_out_warm_ups() -> None:
    """Put nothing in the place of the warm-up of a model's kernels whose import takes packages for GPUs."""
    name = "minimax_m3_msa_warmup"
    module: Any = types.ModuleType(f"vllm.model_executor.warmup.{name}")
    setattr(module, name, lambda worker: None)
    sys.modules[module.__name__] = module


def _launch_compiled_kernels() -> None:
    """Put other kernels in the places of those of vLLM's wheel for CUDA."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from tests.gpu_contract import kernels

    # Memory of the host that a GPU reads and writes itself.
    torch.ops._C.get_cuda_view_from_cpu_tensor = GpuTensor
    # What a graph returns, in memory that is the graph's own.
    torch.ops._C.weak_ref_tensor = lambda tensor: tensor
    torch.ops._C_cache_ops.reshape_and_cache_flash = functools.partial(GPU.call, "store", _store)
    # Layers look it up also where torch's own functions take its place.
    torch.ops._C.silu_and_mul = None
    kernels.install_flash_attention()
    # float32, in which a wrong key shows as more than rounding.
    FlashAttentionBackend.supported_dtypes = [*FlashAttentionBackend.supported_dtypes, torch.float32]
    torch.ops._vllm_fa3_C = types.SimpleNamespace(
        **{
            name: functools.partial(GPU.call, f"fa3.{name}", kernel)
            for name, kernel in vars(torch.ops._vllm_fa3_C).items()
        }
    )


_note_python_ops()
_launch_triton()
_leave_out_warm_ups()


def start() -> None:
    """From now on, this thread has a GPU, and Starling's worker is around the one of worker.py."""
    from vllm.utils.gpu_sync_debug import with_gpu_sync_check

    from starling.engine_ext.worker import star_worker as worker

    _launch_compiled_kernels()
    worker.BASES["StarGPUWorker"] = "tests.gpu_shim.worker.GpuWorker"
    # vLLM looks for waits within its own worker's method; Starling's is around it.
    worker.StarWorker.execute_model = with_gpu_sync_check(worker.StarWorker.execute_model)
    GPU.mode.__enter__()
