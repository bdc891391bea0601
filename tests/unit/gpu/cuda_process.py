"""Makes a process import vLLM as if on CUDA, with stubs of what needs a GPU. For processes of tests only."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

STUBS = (
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "flashinfer",
    "flashinfer.decode",
    "flashinfer.prefill",
    "flashinfer.utils",
)


class Stub(types.ModuleType):
    """A module that has a class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def become_cuda() -> type:
    """Install the stubs and a CUDA platform as vLLM's current one; returns its class, whose ``capability`` is settable.

    To be called before any backend is imported.
    """
    for name in STUBS:
        module = Stub(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Platform(CudaPlatformBase):
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "none"

    vllm.platforms._current_platform = Platform()
    return Platform
