"""Lets vLLM's CUDA code be imported and run on CPU tensors.

Only for a job's own process: it replaces globals of vLLM and torch.
"""

from __future__ import annotations

import sys
import types
from typing import Any

# Compiled parts of vLLM's CUDA wheel. kernels.py has what the attention backends call of them.
EXTENSIONS = (
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.vllm_flash_attn.cute",
    "vllm.vllm_flash_attn.cute.interface",
)


# Operators that vLLM's modules call while they are imported, to learn what the GPU supports.
CAPABILITY_OPERATORS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_fp4",
)


class CudaDevice(str):
    """A device that code takes for a CUDA device, and torch for the CPU."""

    type = "cuda"


CUDA = CudaDevice("cpu")


def use_cuda_platform() -> Any:
    """Make vLLM's CUDA platform the current one, as on an H100; its class, whose ``capability`` can be set.

    Must be called before anything else of vLLM is imported.
    """
    for name in EXTENSIONS:
        sys.modules[name] = types.ModuleType(name)
    import torch
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class ContractPlatform(CudaPlatformBase):
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"a fake GPU of capability {cls.capability.as_version_str()}"

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    vllm.platforms._current_platform = ContractPlatform()
    for name in CAPABILITY_OPERATORS:
        if not hasattr(torch.ops._C, name):
            setattr(torch.ops._C, name, lambda *arguments: False)
    return ContractPlatform
