"""Counts the kernels that Triton would compile for an NVIDIA GPU, without one, and without compiling or running any.

A launch is Triton's own up to its cache of compiled kernels, and so is the key of a kernel there. For a process of its
own, with the shim of tests/v2_shim and without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    is_active=lambda: True,
)
NOTHING = SimpleNamespace(
    launch_metadata=lambda *arguments: None, run=lambda *arguments: None, function=None, packed_metadata=None
)


def count_compiles() -> Counter[str]:
    """From now on, no kernel is compiled or run; returns how often each would have been compiled, by its name."""
    triton.backends.backends.pop("cpu", None)  # the shim's backend, which has no compiler
    driver.set_active(DRIVER)
    compiled: Counter[str] = Counter()

    def compile_nothing(kernel: Any, key: str, signature: Any, device: int, *arguments: Any) -> Any:
        compiled[kernel.fn.__name__] += 1
        kernel.device_caches[device][0][key] = NOTHING
        return NOTHING

    JITFunction._do_compile = compile_nothing
    return compiled


@contextlib.contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Counts by its name how often each kernel is launched while this holds."""
    launched: Counter[str] = Counter()
    run = JITFunction.run

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launched[kernel.fn.__name__] += 1
        return run(kernel, *args, **kwargs)

    JITFunction.run = counted
    try:
        yield launched
    finally:
        JITFunction.run = run
