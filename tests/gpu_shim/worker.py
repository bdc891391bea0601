"""vLLM's GPU worker, whose model is loaded on the CPU and then moved, and which notes what each step ran."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from starling.attention_backends.star import range_attention
from starling.attention_backends.star.rows import VirtualRows
from starling.attention_backends.star.step import current_step
from tests.gpu_shim.cuda import Graph
from tests.gpu_shim.device import GPU, GpuTensor

ATTENTION = "vllm::unified_attention_with_output"


@dataclass(frozen=True)
class Step:
    """What a step of the model runner ran.

    Attributes:
        runner: the model runner, "v1" or "v2".
        tokens, requests: of the step.
        rewritten: whether a row became several, or one that sees less than all keys before it.
        rerotated: whether rows attended to documents.
        replayed: launches of the full graph that was replayed; 0: none was.
        launches: those of each attention layer, also in a replay.
        copies: from and to pinned memory, under way at its end.
    """

    runner: str
    tokens: int
    requests: int
    rewritten: bool
    rerotated: bool
    replayed: int
    launches: list[int]
    copies: int


STEPS: list[list[dict[str, Any]]] = []
"""The steps since each call of ``next_batch``."""


WARMED: set[str] = set()
"""Triton's kernels that were launched before the first batch."""


def next_batch(worker: Any) -> None:
    if not STEPS:
        WARMED.update(GPU.triton)
    STEPS.append([])


def kernels_after_the_start() -> list[str]:
    """Starling's kernels that no run before the first batch has launched: each would be compiled in a step."""
    return sorted(name for name in GPU.triton - WARMED if name.startswith("starling."))


def leave_room_for_few_ranges(worker: Any) -> None:
    """From now on, a full graph has no room for a step of two prompts with documents."""
    range_attention.MAX_RANGES = 9


class GpuWorker(Worker):
    def load_model(self, **options: Any) -> None:
        """A parameter of a class of vLLM's can't be made of a GpuTensor, so the model is made on the CPU."""
        self.load_config.device = "cpu"
        super().load_model(**options)
        for module in self.model_runner.get_model().modules():
            for tensors in (module._parameters, module._buffers, vars(module)):
                for name, tensor in tensors.items():
                    if isinstance(tensor, torch.Tensor):
                        tensors[name] = _moved(tensor)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        Graph.replayed = 0
        GPU.calls.pop(ATTENTION, None)
        result = super().execute_model(scheduler_output, *args, **kwargs)
        if STEPS and scheduler_output.total_num_scheduled_tokens:
            step = current_step()
            rows = step.built_rows(self.cache_config.block_size) if step else None
            made = Step(
                runner="v2" if isinstance(self.model_runner, GPUModelRunner) else "v1",
                tokens=scheduler_output.total_num_scheduled_tokens,
                requests=len(scheduler_output.num_scheduled_tokens),
                rewritten=rows is not None and _are_others(rows),
                rerotated=rows is not None and rows.rerotated is not None,
                replayed=Graph.replayed,
                launches=GPU.calls[ATTENTION],
                copies=len(GPU.copies),
            )
            STEPS[-1].append(asdict(made))
        return result


def _are_others(rows: VirtualRows) -> bool:
    """Whether virtual rows are others than those of the batch; those of a prompt's first block are not."""
    return bool(len(rows.gathered)) or rows.rerotated is not None or len(set(rows.source)) < len(rows.source)


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    moved = GpuTensor(tensor.detach())
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else moved
