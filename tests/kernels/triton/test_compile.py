"""The Triton kernels compile for NVIDIA cards to machine code, without a card.

These tests show what the interpreter can't: the compiler accepts the kernels, and they use the tensor cores, fit the
shared memory of the smallest cards, and keep their tiles in registers.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from starling.attention_backends.kernels.contract import Sizes
from starling.attention_backends.kernels.triton import paged as triton_attention
from starling.attention_backends.kernels.triton.attend import paged_attention_kernel
from starling.attention_backends.kernels.triton.launch import E4M3_CAPABILITY, head_block, make_tile
from starling.attention_backends.kernels.triton.paged import merge_kernel
from tests.kernels.machine_code import loads_beside_products

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = 99 * 1024
SPILLED_BYTES = 64

pytestmark = pytest.mark.skipif(
    not (TOOLS / "ptxas").exists() or triton.knobs.runtime.interpret, reason="needs Triton's NVIDIA compiler"
)


@dataclass(frozen=True)
class Build:
    capability: int
    dtype: str
    cache: str
    head_size: int
    group: int
    decode: bool
    instruction: str
    causal: bool = True
    queries_per_key: int = 1
    windowed: bool = False
    capped: bool = False


def compile_attend(build: Build) -> triton.compiler.CompiledKernel:
    """Compile the kernel as the launcher does, for contiguous tensors that are aligned to 16 bytes."""
    sizes = Sizes(1, 1, build.group, 1, build.head_size, build.head_size, 16)
    lanes = triton_attention.DECODE_LANES if build.decode else triton_attention.PREFILL_LANES
    tile = make_tile(sizes, 4 if build.dtype == "fp32" else 2, lanes)
    constants = {
        "GROUP": build.group,
        "PAGE_SIZE": 16,
        "HEAD_SIZE": build.head_size,
        "HEAD_SIZE_V": build.head_size,
        "BLOCK_M": tile.lanes,
        "BLOCK_N": tile.keys,
        "BLOCK_D": head_block(build.head_size),
        "BLOCK_DV": head_block(build.head_size),
        "CAUSAL": build.causal,
        "QUERIES_PER_KEY": build.queries_per_key,
        "WINDOWED": build.windowed,
        "CAPPED": build.capped,
        "PARTIAL": build.decode,
        "UPCAST": False,
    } | dict.fromkeys(("query_stride", "key_stride", "value_stride", "out_stride", "lse_head_stride"), 1)
    types = {
        "query": f"*{build.dtype}",
        "key_cache": f"*{build.cache}",
        "value_cache": f"*{build.cache}",
        "out": "*fp32" if build.decode else f"*{build.dtype}",
        "lse": "*fp32",
        "block_table": "*i32",
        "query_start_loc": "*i32",
        "seq_lens": "*i32",
    } | dict.fromkeys(("scale", "softcap", "value_scale"), "fp32")
    names = paged_attention_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in paged_attention_kernel.do_not_specialize
        and (signature[name].startswith("*") or re.fullmatch(r"(query|key|value|out)_\w+_stride", name))
    }
    source = ASTSource(paged_attention_kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)


def spilled_bytes(kernel: triton.compiler.CompiledKernel, directory: Path) -> int:
    """Bytes of a thread's stack, from the machine code."""
    binary = directory / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


@pytest.mark.parametrize(
    "build",
    [
        Build(80, "bf16", "bf16", 128, 4, False, "mma.sync"),
        Build(80, "fp16", "fp8e5", 80, 3, True, "mma.sync", windowed=True),
        Build(86, "bf16", "bf16", 128, 4, False, "mma.sync"),
        Build(86, "bf16", "bf16", 128, 8, True, "mma.sync"),
        Build(90, "bf16", "bf16", 128, 4, False, "wgmma"),
        Build(90, "bf16", "bf16", 64, 1, False, "wgmma", queries_per_key=8),
        Build(90, "bf16", "fp8e4nv", 128, 8, True, "mma.sync"),
        Build(90, "fp16", "fp16", 64, 1, False, "wgmma", causal=False, capped=True),
        Build(90, "fp32", "fp32", 128, 4, False, "fma"),
        Build(100, "bf16", "bf16", 256, 8, False, "tcgen05", windowed=True),
        Build(120, "bf16", "bf16", 128, 4, False, "mma.sync"),
        Build(120, "bf16", "bf16", 128, 8, True, "mma.sync"),
    ],
    ids=lambda build: "-".join(
        map(
            str, (build.capability, build.dtype, build.cache, build.head_size, build.instruction, build.queries_per_key)
        )
    ),
)
def test_kernel_compiles_and_fits(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compile_attend(build)
    assert build.instruction in kernel.asm["ptx"]
    assert min(loads_beside_products(kernel)) > 0
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES


def test_e4m3_needs_the_capability_that_the_launcher_requires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    build = Build(0, "bf16", "fp8e4nv", 64, 1, True, "mma.sync")
    major, minor = E4M3_CAPABILITY
    compile_attend(replace(build, capability=10 * major + minor))
    with pytest.raises(triton.CompilationError):
        compile_attend(replace(build, capability=86))


def test_merge_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    constants = {"HEAD_SIZE_V": 80, "BLOCK_DV": 128, "BLOCK_S": 128, "out_stride": 1, "lse_head_stride": 1}
    types = {"parts": "*fp32", "parts_lse": "*fp32", "out": "*bf16", "lse": "*fp32"}
    names = merge_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    kernel = triton.compile(ASTSource(merge_kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
