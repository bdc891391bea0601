"""Run in a process with the shim of tests/v2_shim, which makes Triton usable without a GPU.

interpret   runs the scan as Python and in torch, and compares both to the recurrence in float64 (TRITON_INTERPRET=1)
wide        runs the scan as Python on chunks that lie far apart (TRITON_INTERPRET=1)
compile     compiles the kernel for NVIDIA GPUs to machine code (without TRITON_INTERPRET)
steps       counts the kernels that steps of any size compile (without TRITON_INTERPRET)
"""

from __future__ import annotations

import sys

import torch

from starling.attention_backends.attamba import scan, scan_kernel
from starling.attention_backends.attamba.mixer import MixerParameters, MixerSizes
from tests.kernels.cases import rms

MIXERS = 2


def recurrence(rows: torch.Tensor, conv: torch.Tensor, a_log: torch.Tensor, skip: torch.Tensor, sizes: MixerSizes):
    """(W, inner) of one mixer over one chunk (W, columns) in float64, token by token (arXiv 2405.21060, equation 1)."""
    outputs, memory = [], torch.zeros(sizes.heads, sizes.inner // sizes.heads, sizes.state, dtype=torch.float64)
    for token in range(len(rows)):
        recent = rows[max(0, token + 1 - sizes.taps) : token + 1, : -sizes.heads]
        mixed = torch.nn.functional.silu((recent * conv[-len(recent) :]).sum(0))
        u, b, c = mixed.split([sizes.inner, sizes.state, sizes.state])
        u, dt = u.unflatten(0, (sizes.heads, -1)), torch.nn.functional.softplus(rows[token, -sizes.heads :])
        memory = torch.exp(-dt * a_log.exp())[:, None, None] * memory + (dt[:, None] * u)[..., None] * b
        outputs.append((memory @ c + skip[:, None] * u).flatten())
    return torch.stack(outputs)


def make_parameters(sizes: MixerSizes) -> MixerParameters:
    shapes = (sizes.taps, sizes.channels), (sizes.heads,), (sizes.heads,), (sizes.inner,)
    return MixerParameters(*(torch.randn(MIXERS, *shape) for shape in shapes))


def interpret() -> None:
    """Chunks of one token to a whole width, some begun in earlier steps. Rows past a chunk's last token are padding."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype, sizes, width, lens, firsts in (
        (torch.float32, MixerSizes(2, 32, 16, 4), 8, (8, 8, 3, 1), (0, 5, 1, 0)),
        (torch.bfloat16, MixerSizes(4, 96, 40, 4), 64, (64, 33), (63, 0)),
        (torch.float32, MixerSizes(1, 16, 16, 2), 1, (1, 1), (0, 0)),
        (torch.float32, MixerSizes(2, 256, 16, 4), 16, (16, 7), (9, 0)),  # heads of 128: several blocks of columns
    ):
        torch.manual_seed(0)
        projected = torch.randn(len(lens), width, MIXERS, sizes.width).to(dtype)
        for index, length in enumerate(lens):
            projected[index, length:] = projected[index, length - 1]  # the model pads chunks like this
        parameters = make_parameters(sizes)
        chunk = torch.cat([torch.full((n - first,), i) for i, (n, first) in enumerate(zip(lens, firsts, strict=True))])
        place = torch.cat([torch.arange(first, n) for n, first in zip(lens, firsts, strict=True)])
        exact = torch.stack(
            [
                torch.stack(
                    [
                        recurrence(rows[:, m].double(), *(p[m].double() for p in parameters[:3]), sizes)
                        for rows in projected
                    ]
                )
                for m in range(MIXERS)
            ],
            2,
        )[chunk, place]
        plain = scan.chunk_scan(projected, parameters, sizes, chunk, place)
        got = scan_kernel.chunk_scan(projected, parameters, sizes, chunk, place)
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        ulp = torch.finfo(torch.float32).eps * rms(exact)
        errors = rms(got - exact), rms(plain - exact)
        assert errors[0] <= 1.1 * errors[1] + ulp, (dtype, errors, ulp)
        wrong = scan_kernel.chunk_scan(projected, parameters._replace(skip=parameters.skip + 1), sizes, chunk, place)
        assert rms(wrong - exact) > 1e-2


def interpret_wide() -> None:
    """Chunks at offsets above 2^31 elements."""
    from tests.kernels.sparse import keep_arguments_in_place, spread

    keep_arguments_in_place()
    torch.manual_seed(0)
    sizes, width = MixerSizes(2, 32, 16, 4), 4
    projected = torch.randn(3, width, MIXERS, sizes.width)
    parameters = make_parameters(sizes)
    indices = torch.arange(3).repeat_interleave(width), torch.arange(width).repeat(3)
    want = scan.chunk_scan(projected, parameters, sizes, *indices)
    got = scan_kernel.chunk_scan(spread(projected), parameters, sizes, *indices)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def compile_kernels() -> None:
    """The widest chunks that are served, with heads of more than one block of columns, and the smallest tiles."""
    from tests.kernels.machine_code import CAPABILITIES, check_resources

    for capability in CAPABILITIES:
        for width, head_size in ((128, 128), (64, 128), (16, 16)):
            constants = {
                "HEADS": 8,
                "INNER": 8 * head_size,
                "STATE": 128,
                "TAPS": 4,
                **scan_kernel.tile(width, head_size),
            }
            for dtype, aligned in (("bf16", True), ("fp32", False)):
                types = {
                    "projected": f"*{dtype}",
                    **dict.fromkeys(("conv_weight", "a_log", "skip", "out"), "*fp32"),
                    **dict.fromkeys(("starts", "index_in_chunk"), "*i64"),
                }
                warps = scan_kernel.warps(constants["BLOCK_W"])
                made = check_resources(scan_kernel.scan_kernel, types, constants, capability, aligned, num_warps=warps)
                assert "mma" in made.kernel.asm["ptx"]


def count_kernels_of_steps() -> None:
    """Steps with any number of chunks, of 1 to 16 tokens and of 17 to 32: one kernel for each of these widths."""
    from tests.kernels.compiles import count_compiles

    compiled = count_compiles()
    sizes = MixerSizes(8, 256, 128, 4)
    parameters = make_parameters(sizes)
    for chunks, width in ((1, 1), (2, 1), (3, 5), (16, 16), (1, 16), (5, 9), (1, 17), (7, 32), (16, 20)):
        projected = torch.randn(chunks, width, MIXERS, sizes.width)
        indices = torch.arange(chunks).repeat_interleave(width), torch.arange(width).repeat(chunks)
        scan_kernel.chunk_scan(projected, parameters, sizes, *indices)
    assert compiled == {"scan_kernel": 2}, compiled


def main() -> None:
    jobs = {"interpret": interpret, "wide": interpret_wide, "compile": compile_kernels, "steps": count_kernels_of_steps}
    jobs[sys.argv[1]]()
