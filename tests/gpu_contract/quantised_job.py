"""Run in a process of its own: looks at attention blocks with quantised layers, and prints a JSON line of the problems.

vLLM's own kernel classes for W8A8-INT8 and for INT4 run. The compiled operators below them are emulated, and refuse
what those of the CUDA wheel refuse.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

from tests.gpu_contract.cuda_platform import use_cuda_platform

PLATFORM = use_cuda_platform()
PLATFORM.dispatch_key = "CPU"  # of vLLM's operators in Python, whose tensors are the CPU's here

import torch  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel  # noqa: E402
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig  # noqa: E402
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassInt8ScaledMMLinearKernel  # noqa: E402
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (  # noqa: E402
    Int8ScaledMMLinearLayerConfig,
)
from vllm.scalar_type import scalar_types  # noqa: E402

from starling.attention_backends.star.document_layers import block_positions_problem  # noqa: E402
from starling.vllm_compat import models  # noqa: E402
from tests.gpu_contract.kernels import require  # noqa: E402
from tests.unit.engine_ext.worker.test_rotations import HEADS, KV_HEADS, SIZE, Block, FakeAttention  # noqa: E402

INPUTS, OUTPUTS, GROUP_SIZE, TILE = 128, (HEADS + 2 * KV_HEADS) * SIZE, 64, 16
HALVES = (torch.float16, torch.bfloat16)


def quantise(out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, azp: torch.Tensor | None) -> None:
    """dynamic_scaled_int8_quant: one scale for each token."""
    require(azp is None, "asymmetric quantisation")
    scales.copy_(x.float().abs().amax(-1, keepdim=True) / 127)
    out.copy_((x.float() / scales).round())


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor, bias) -> None:
    """cutlass_scaled_mm: int8 (T, K) and (K, N), with the scales (T, 1) and (1, N)."""
    require(a.dtype == b.dtype == torch.int8, f"{a.dtype} times {b.dtype}")
    require(out.dtype in HALVES, f"an output in {out.dtype}")
    require(bias is None, "a bias")
    out.copy_(a.float() @ b.float() * of_a * of_b)


def multiply_packed(a: torch.Tensor, out, weight: torch.Tensor, bias, scales: torch.Tensor, *_: object) -> torch.Tensor:
    """marlin_gemm: (T, K) times 4-bit weights, (K / 16, 2 N) int32, of which each takes the next 4 bits."""
    require(a.dtype in HALVES, f"inputs in {a.dtype}")
    require(scales.dtype == a.dtype, f"scales in {scales.dtype} of inputs in {a.dtype}")
    require(out is None and bias is None, "an output or a bias")
    numbers = (weight[..., None] >> torch.arange(0, 32, 4)) & 15
    dense = (numbers.reshape(a.shape[1], -1) - 8).float().unflatten(0, (len(scales), -1)) * scales[:, None].float()
    return (a.float() @ dense.flatten(0, 1)).to(a.dtype)


class Int8(torch.nn.Module):
    """A layer as W8A8-INT8 checkpoints have it, once vLLM has loaded them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8).t())
        self.weight_scale = parameter(torch.full((1, OUTPUTS), 1e-3))
        names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
        self.kernel = CutlassInt8ScaledMMLinearKernel(Int8ScaledMMLinearLayerConfig(False, True, True), names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply_weights(self, x)


class Int4(torch.nn.Module):
    """A layer as INT4 checkpoints have it, once Marlin has packed its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        packed = torch.randint(-(2**31), 2**31, (INPUTS // TILE, OUTPUTS * TILE // 8))
        self.weight = parameter(packed.to(torch.int32))
        self.weight_scale = parameter(torch.full((INPUTS // GROUP_SIZE, OUTPUTS), 1e-2, dtype=dtype))
        self.zeros = parameter(torch.empty(0, dtype=torch.int32))
        shape = INPUTS, OUTPUTS
        config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, dtype, GROUP_SIZE, zero_points=False)
        self.kernel = MarlinLinearKernel(config, "weight", "weight_scale", "zeros")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply_weights(self, x)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def problem(layer: type[torch.nn.Module], dtype: torch.dtype) -> str | None:
    block = Block(dtype=dtype)
    block.projection = layer(dtype)
    block.attn.impl = SimpleNamespace(alibi_slopes=None, sinks=None, kv_cache_dtype="auto")
    model = torch.nn.ModuleDict({"self_attn": block})
    return block_positions_problem(model, ["layer"], "cuda", INPUTS, dtype)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models.Attention = FakeAttention
    torch.ops._C.dynamic_scaled_int8_quant = quantise
    torch.ops._C.cutlass_scaled_mm = multiply
    torch.ops._C.marlin_gemm = multiply_packed
    found = {
        f"{layer.__name__} in {str(dtype).removeprefix('torch.')}": problem(layer, dtype)
        for layer in (Int8, Int4)
        for dtype in HALVES
    }
    print(json.dumps(found))
