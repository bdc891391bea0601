"""Run in a process with the shim of tests/v2_shim, which makes Triton usable without a GPU.

interpret   runs the scan as Python and in torch, and compares both to the recurrence in float64 (TRITON_INTERPRET=1)
compile     compiles the kernel for an NVIDIA GPU to machine code (without TRITON_INTERPRET)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from attention_backends.attamba import scan, scan_kernel
from attention_backends.attamba.mixer import MixerSizes
from tests.kernels.cases import rms

MIXERS = 2
SPILLED_BYTES, SHARED_MEMORY = 64, 99 * 1024  # as in triton/test_compile.py


def recurrence(rows: torch.Tensor, conv: torch.Tensor, a_log: torch.Tensor, skip: torch.Tensor, sizes: MixerSizes):
    """(W, inner) of one mixer over one chunk (W, columns) in float64, token by token (arXiv 2405.21060, equation 1)."""
    outputs, memory = [], torch.zeros(sizes.heads, sizes.inner // sizes.heads, sizes.state, dtype=torch.float64)
    for token in range(len(rows)):
        recent = rows[max(0, token + 1 - sizes.taps) : token + 1, : -sizes.heads]
        mixed = torch.nn.functional.silu((recent * conv[:, -len(recent) :].T).sum(0))
        u, b, c = mixed.split([sizes.inner, sizes.state, sizes.state])
        u, dt = u.unflatten(0, (sizes.heads, -1)), torch.nn.functional.softplus(rows[token, -sizes.heads :])
        memory = torch.exp(-dt * a_log.exp())[:, None, None] * memory + (dt[:, None] * u)[..., None] * b
        outputs.append((memory @ c + skip[:, None] * u).flatten())
    return torch.stack(outputs)


def interpret() -> None:
    """Chunks of one token to a whole width, some begun in earlier steps. Rows past a chunk's last token are padding."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype, sizes, width, lens, firsts in (
        (torch.float32, MixerSizes(2, 32, 16, 4), 8, (8, 8, 3, 1), (0, 5, 1, 0)),
        (torch.bfloat16, MixerSizes(4, 96, 40, 4), 64, (64, 33), (63, 0)),
        (torch.float32, MixerSizes(1, 16, 16, 2), 1, (1, 1), (0, 0)),
    ):
        torch.manual_seed(0)
        columns = sizes.inner + 2 * sizes.state
        projected = torch.randn(len(lens), width, MIXERS, columns + sizes.heads).to(dtype)
        for index, length in enumerate(lens):
            projected[index, length:] = projected[index, length - 1]  # the model pads chunks like this
        parameters = (
            torch.randn(MIXERS, columns, sizes.taps).to(dtype),
            torch.randn(MIXERS, sizes.heads),
            torch.randn(MIXERS, sizes.heads),
        )
        chunk = torch.cat([torch.full((n - first,), i) for i, (n, first) in enumerate(zip(lens, firsts, strict=True))])
        place = torch.cat([torch.arange(first, n) for n, first in zip(lens, firsts, strict=True)])
        exact = torch.stack(
            [
                torch.stack(
                    [recurrence(rows[:, m].double(), *(p[m].double() for p in parameters), sizes) for rows in projected]
                )
                for m in range(MIXERS)
            ],
            2,
        )[chunk, place]
        plain = scan.chunk_scan(projected, *parameters, sizes, chunk, place)
        got = scan_kernel.chunk_scan(projected, *parameters, sizes, chunk, place)
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        ulp = torch.finfo(torch.float32).eps * rms(exact)
        errors = rms(got - exact), rms(plain - exact)
        assert errors[0] <= 1.1 * errors[1] + ulp, (dtype, errors, ulp)
        wrong = scan_kernel.chunk_scan(projected, parameters[0], parameters[1], parameters[2] + 1, sizes, chunk, place)
        assert rms(wrong - exact) > 1e-2


def compile_kernels() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.backends.backends.pop("cpu")  # the shim's backend, which has no compiler
    pointers = {
        **dict.fromkeys(("projected", "conv_weight"), "*bf16"),
        **dict.fromkeys(("a_log", "skip", "out"), "*fp32"),
        **dict.fromkeys(("starts", "index_in_chunk"), "*i64"),
    }
    sizes = {"HEADS": 8, "INNER": 256, "STATE": 128, "TAPS": 4, "BLOCK_S": scan_kernel.BLOCK_S, "BLOCK_D": 32}
    for width in (16, 64, 128):
        constants = sizes | {"BLOCK_W": width, "BLOCK_Q": min(width, scan_kernel.BLOCK_Q)}
        names = scan_kernel.scan_kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        source = ASTSource(scan_kernel.scan_kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": scan_kernel.warps(width)})
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(made.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        assert int(re.search(r"STACK:(\d+)", usage)[1]) <= SPILLED_BYTES
        assert "mma" in made.asm["ptx"]
        assert made.metadata.shared <= SHARED_MEMORY


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_kernels}[sys.argv[1]]()
