"""LoRA on a CPU by one op for each layer (lora.cpp), which multiplies only rows that have an adapter.

In torch each layer would take several small products, and in a compiled model all rows would take them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from starling.attention_backends.kernels.cpu.paged_op import built_op
from starling.vllm_compat.cpu_lora import MaskedLoRA, use_lora_class


def use_own_lora() -> None:
    """Let LoRA layers that this process makes on a CPU use the op, or MaskedLoRA where it can't be built."""
    if built_op() is None:
        use_lora_class(MaskedLoRA)
        return
    _register_shapes()
    use_lora_class(OwnLoRA)


@functools.cache
def _register_shapes() -> None:
    """Tell torch.compile that the op has no result."""
    torch.library.register_fake("starling_kernels::add_lora", lambda *args: None)


class OwnLoRA(MaskedLoRA):
    """The layers' products by Starling's op."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """``y[:, slice i] += scale * (x @ A[i]) @ B[i]``. Shapes as of vLLM's method."""
        if lora_a_stacked[0].dtype != x.dtype:  # --lora-dtype
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        torch.ops.starling_kernels.add_lora(y, x, self.slots, list(lora_a_stacked), list(lora_b_stacked), scale)
