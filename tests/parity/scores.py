"""The log-probabilities of vLLM's V2 model runner, by torch.

vLLM's two kernels run once for each token, which takes 10 ms under Triton's interpreter. They stay for steps of few
tokens, so for all that are generated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FEW = 8


def score_in_torch() -> None:
    """Replace the kernels in this process."""
    from vllm.v1.worker.gpu.sample import logprob

    logprob._topk_log_softmax_kernel = Kernel(logprob._topk_log_softmax_kernel, logprobs_of)
    logprob._ranks_kernel = Kernel(logprob._ranks_kernel, ranks_of)


class Kernel:
    """A kernel, launched as kernel[grid](...), which torch computes for more than FEW programs."""

    def __init__(self, kernel: Any, in_torch: Callable[..., None]) -> None:
        self.kernel, self.in_torch = kernel, in_torch

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        return self.kernel[grid] if grid[0] <= FEW else self.in_torch


def logprobs_of(
    out: torch.Tensor, logits: torch.Tensor, _: int, token_ids: torch.Tensor, *sizes: int, **constants: int
) -> None:
    out.copy_(logits.float().log_softmax(-1).gather(1, token_ids))


def ranks_of(
    out: torch.Tensor, logits: torch.Tensor, _: int, token_ids: torch.Tensor, *sizes: int, **constants: int
) -> None:
    out.copy_((logits >= logits.gather(1, token_ids[:, None].long())).sum(1))
