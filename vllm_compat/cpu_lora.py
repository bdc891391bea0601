"""LoRA on CPUs: rows without an adapter stay as they are, and rows with one cost two small products.

vLLM's own ops for CPUs (vllm/lora/ops/torch_ops) copy both matrices of an adapter for each row. In vLLM 0.32 they take
them by the row's index, which is -1 for a row without an adapter. That takes those of the last slot: a request of the
base model that runs beside one of the adapter there gets that adapter. Goes when 0.32 is no longer supported, and the
ops copy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from starling.vllm_compat.patching import Original, extends, touches, wrap


def use_lora_class(chosen: type[PunicaWrapperCPU]) -> None:
    """Let LoRA layers that this process makes on a CPU use a class."""
    from vllm.platforms.cpu import CpuPlatform

    @wrap(CpuPlatform, "get_punica_wrapper")
    def get_punica_wrapper(original: Original, cls: Any) -> str:
        return f"{chosen.__module__}.{chosen.__name__}"


def compile_with_lora(is_activated: Callable[[Any], bool]) -> None:
    """Let vLLM compile models that have LoRA in their layers on CPUs, too.

    It does not, since its ops for CPUs can't be compiled; those here can. A token takes half as long again without.
    Goes when vLLM compiles them.

    Args:
        is_activated: returns whether Starling is activated for an engine of this VllmConfig.
    """
    from vllm.platforms.cpu import CpuPlatform

    @wrap(CpuPlatform, "check_and_update_config")
    def check_and_update_config(original: Original, cls: Any, vllm_config: Any) -> None:
        lora_config = vllm_config.lora_config
        if not is_activated(vllm_config):
            return original(cls, vllm_config)
        vllm_config.lora_config = None  # of which the method only asks whether it is there
        try:
            return original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config


@extends(PunicaWrapperCPU)
@touches("vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.{_token_lora_indices, _sampler_indices}")
class MaskedLoRA(PunicaWrapperCPU):
    """The same products for all rows, of which each slot keeps those of its own adapter.

    There is a handful of slots (--max-loras). Nothing depends on the values of indices, so that it can be compiled.
    """

    @property
    def slots(self) -> torch.Tensor:
        """Return (n or more,) int64, the slot of each row, or -1 for none."""
        return self._token_lora_indices

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: Sequence[torch.Tensor], scale: float, **kwargs: Any
    ) -> None:
        """Compute ``y[i] = scale * (x @ A[i])``; rows without an adapter are 0. Shapes as of vLLM's method."""
        x = x.view(-1, x.shape[-1])
        for out, weights in zip(y, lora_a_stacked, strict=True):
            out.view(-1, out.shape[-1]).copy_(masked_product(x, weights, self.slots) * scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Compute ``y[:, slice i] += x[i] @ B[i]``, or ``=`` without ``add_inputs``. Shapes as of vLLM's method."""
        y = y.view(-1, y.shape[-1])
        for rows, weights, size in zip(x, lora_b_stacked, output_slices, strict=True):
            out = y[:, offset_start : offset_start + size]
            put(out, masked_product(rows.to(y.dtype), weights, self.slots), self._rows(y), add_inputs)
            offset_start += size

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Compute ``y += x @ B``, or ``=`` without ``add_inputs``. Shapes as of vLLM's method."""
        put(y, masked_product(x.to(y.dtype), lora_b_stacked, self.slots), self._rows(y), add_inputs)

    def _rows(self, y: torch.Tensor) -> torch.Tensor:
        """Return (n, 1) the slot of each row, or -1 for none."""
        return self.slots[: y.shape[0], None]

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Compute ``y += scale * (x @ A) @ B`` for rows that are sampled. Shapes are those of vLLM's method."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        low = masked_product(x, lora_a_stacked, self._sampler_indices) * scale
        y.add_(masked_product(low.to(y.dtype), lora_b_stacked, self._sampler_indices))


def put(out: torch.Tensor, added: torch.Tensor, slots: torch.Tensor, add_inputs: bool) -> None:
    """Add to rows, or replace those that have an adapter.

    Args:
        slots: (n, 1) the slot of each row; -1: none.
    """
    out.add_(added) if add_inputs else out.copy_(torch.where(slots >= 0, added, out))


def masked_product(x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Multiply each row by the matrix of its adapter, to (n, out); 0 for rows without one.

    Args:
        x: (n, in).
        weights: (slots, 1, out, in), or (slots, out, in).
        indices: (n or more,) the slot of each row; -1: none.
    """
    of_rows = indices[: x.shape[0], None]
    found = x.new_zeros(x.shape[0], weights.shape[-2])
    for slot in range(weights.shape[0]):
        matrix = weights[slot].view(weights.shape[-2:]).to(x.dtype)
        found += torch.where(of_rows == slot, x @ matrix.T, 0)
    return found
