"""Compiles Triton kernels for NVIDIA GPUs, without one, and reads the resources of the machine code.

Run in a process with the shim of tests/v2_shim and without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = 80, 86, 90, 100, 120
STACK_BYTES, SHARED_BYTES = 64, 99 * 1024  # as in triton/test_compile.py
REGISTERS, REGISTER_UNIT, RESERVED_BYTES = 65_536, 8, 1024
MULTIPROCESSOR_BYTES = {80: 164 * 1024, 86: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
"""Shared memory of a multiprocessor by compute capability (CUDA programming guide, as the registers of all of them)."""


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel, and the registers of a thread."""

    kernel: triton.compiler.CompiledKernel
    capability: int
    registers: int

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor has at once."""
        per_thread = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // (per_thread * 32 * self.kernel.metadata.num_warps)
        by_memory = MULTIPROCESSOR_BYTES[self.capability] // (self.kernel.metadata.shared + RESERVED_BYTES)
        return min(by_registers, by_memory)


def loads_beside_products(kernel: triton.compiler.CompiledKernel) -> list[int]:
    """For each loop over keys, the copies that are still on their way when a product of them is computed."""
    loops = re.findall(r"scf\.for .*?scf\.yield", kernel.asm["ttgir"], re.DOTALL)
    return [max(map(int, re.findall(r"async_wait .*num = (\d+)", loop)), default=0) for loop in loops]


def check_resources(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    aligned: bool,
    **options: Any,
) -> MachineCode:
    """Compile a kernel and check that its programs spill no registers and fit the shared memory of small cards.

    Args:
        types: of arguments, by name; the other arguments are i32.
        constants: the constexpr arguments.
        aligned: whether strides are multiples of 16. Pointers always are. Nothing is known of what the kernel is not
            specialised on.
        options: of the compiler.
    """
    triton.backends.backends.pop("cpu", None)  # the shim's backend, which has no compiler
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in kernel.do_not_specialize
        and (signature[name].startswith("*") or (aligned and name.endswith("_stride")))
    }
    source = ASTSource(kernel, signature, dict(constants), divisible)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    print(f"{kernel.fn.__name__} sm_{capability} aligned={aligned} {dict(constants)} stack={stack}")
    assert stack <= STACK_BYTES, (capability, constants, aligned, stack)
    assert made.metadata.shared <= SHARED_BYTES, (capability, constants, aligned, made.metadata.shared)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return MachineCode(made, capability, registers)
