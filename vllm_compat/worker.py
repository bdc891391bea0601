"""vLLM's workers and model runners. What is there for runner V1 goes with vLLM 0.33, the last that has it."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode

from starling.vllm_compat.patching import touches


@touches("vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_batch", before="0.34")
@touches("vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_attn")
def keep_request_ids(runner: Any) -> None:
    """Let a V2 model runner keep the request ids of the batch whose metadata it is about to make.

    V1 keeps its input batch itself. V2's metadata names the requests of most models, but not those of hybrid ones.
    Goes when the metadata of both runners carries request ids.
    """
    if hasattr(runner, "input_batch"):
        return

    prepare_attn = runner.prepare_attn

    def keep(input_batch: Any) -> Any:
        runner.starling_request_ids = input_batch.req_ids
        return prepare_attn(input_batch)

    runner.prepare_attn = keep


@touches("vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_batch", before="0.34")
def batch_request_ids(runner: Any) -> Sequence[str]:
    """Request id of each real row of the batch that a model runner makes metadata for, in its order.

    Goes with ``keep_request_ids``.
    """
    return runner.input_batch.req_ids if hasattr(runner, "input_batch") else runner.starling_request_ids


@touches("vllm.v1.worker.gpu_model_runner.GPUModelRunner._model_forward", before="0.34")
@touches(
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.model_state",
    "vllm.v1.worker.gpu.model_states.interface.ModelState.prepare_inputs",
)
def before_forward(runner: Any, take: Callable[[torch.Tensor], None]) -> None:
    """Give ``take`` the positions of a batch's tokens before its forward pass; it may change them in place.

    vLLM has a method for this that subclasses may override: of V1's model runner, and of the model state of V2's. It
    has no option for such a subclass. A hook of the model would not do: a model whose class vLLM compiles as a whole
    (``support_torch_compile``) runs no hooks. Goes when the class of a model runner is an option.

    Args:
        runner: model runner V1 or V2, with its model.
        take: function that gets (tokens,) int64, or one row for each kind of positions; in V2 also those of dummy runs.
    """
    if hasattr(runner, "_model_forward"):
        forward = runner._model_forward

        def model_forward(*, positions: torch.Tensor, **inputs: Any) -> Any:
            take(positions)
            return forward(positions=positions, **inputs)

        runner._model_forward = model_forward
        return

    prepare_inputs = runner.model_state.prepare_inputs

    def prepare(input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs = prepare_inputs(input_batch, req_states)
        take(inputs.get("positions", input_batch.positions))
        return inputs

    runner.model_state.prepare_inputs = prepare


@contextlib.contextmanager
@touches(
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.cudagraph_dispatcher",
    "vllm.v1.cudagraph_dispatcher.CudagraphDispatcher.dispatch",
    before="0.34",
)
@touches(
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.cudagraph_manager",
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch",
)
def without_full_graphs(runner: Any) -> Iterator[None]:
    """Let a model runner, V1 or V2, replay no full CUDA graph of decodes for the duration of the block.

    Goes when a step can say so itself.
    """
    graphs = getattr(runner, "cudagraph_dispatcher", None) or runner.cudagraph_manager
    dispatch, is_v1 = graphs.dispatch, hasattr(runner, "cudagraph_dispatcher")

    def without(*args: Any, **options: Any) -> Any:
        if is_v1:
            options["invalid_modes"] = {CUDAGraphMode.FULL, *(options.get("invalid_modes") or ())}
            return dispatch(*args, **options)
        found = dispatch(*args, **options)
        if found.cg_mode is not CUDAGraphMode.FULL:
            return found
        given = inspect.signature(dispatch).bind(*args, **options).arguments
        return dispatch(**{**given, "uniform_token_count": None, "max_query_len": None})

    graphs.dispatch = without
    try:
        yield
    finally:
        del graphs.dispatch


@contextlib.contextmanager
@touches("vllm.v1.worker.gpu_model_runner.GPUModelRunner.discard_request_mask", before="0.34")
def without_discarded_generators(runner: Any) -> Iterator[None]:
    """Let rows whose sample will be discarded have no generator of their own for the duration of the block.

    These are rows of an unfinished prefill.

    vLLM's V1 runner lets them sample and then rewinds their generators by offset, which a CPU generator refuses:
    one seeded request, prefilled in more than one step, ends a CPU engine. A generator that is left out needs no
    rewinding. Goes with vLLM 0.33.
    """
    generators = runner.input_batch.generators if hasattr(runner, "discard_request_mask") else None
    if not generators or runner.device.type != "cpu":
        yield
        return
    left_out = {row: generators.pop(row) for row in list(generators) if runner.discard_request_mask.np[row]}
    try:
        yield
    finally:
        generators.update(left_out)


SHARED_MEMORY = Path("/dev/shm")


@touches("vllm.distributed.device_communicators.cpu_communicator._CPUSHMDistributed.make_group_name")
def unlink_shared_memory(rank: int) -> None:
    """Remove the names of the memory by which the tensor-parallel ranks of a CPU engine exchange data.

    To be called once the device is set up. All ranks of a group have the memory then, and it is freed with the last
    of them. With its names, it stays for good where a rank is killed: 8 MiB for two ranks. Goes when vLLM unlinks them.

    Args:
        rank: rank of the worker; groups without it may not be set up yet.
    """
    own = os.environ.get("VLLM_DIST_IDENT")
    if own is None:  # not a CPU worker
        return
    for path in SHARED_MEMORY.iterdir():
        group = re.fullmatch(rf"{re.escape(own)}-.*\[([\d-]+)\]-cpushm_\d+", path.name)
        if group is not None and str(rank) in group[1].split("-"):
            path.unlink(missing_ok=True)


@touches("vllm.v1.worker.gpu_model_runner.GPUModelRunner.attn_groups", before="0.34")
@touches("vllm.v1.worker.gpu.model_runner.GPUModelRunner.attn_groups")
def attention_groups(runner: Any) -> list[Any]:
    """Return the attention groups of a model runner, V1 or V2. Goes with a public accessor."""
    return [group for groups in runner.attn_groups for group in groups]


def metadata_builders(runner: Any) -> list[tuple[Any, list[str]]]:
    """Return (metadata builder, its layers' names) of a model runner, V1 or V2."""
    return [(group.get_metadata_builder(0), group.layer_names) for group in attention_groups(runner)]


def attention_backends(worker: Any) -> list[str]:
    """Return the names of the attention backends that a worker's layers run on. Goes when vLLM reports them."""
    return sorted({group.backend.get_name() for group in attention_groups(worker.model_runner)})


def kv_connector() -> Any:
    """Return this worker's KV connector. Goes when workers are handed theirs."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()
