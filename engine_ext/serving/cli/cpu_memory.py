"""Share of a CPU host's memory that an engine takes.

By default, vLLM takes 92 % of all memory for the engine's worker, and does not start if less is free.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import psutil
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from starling.vllm_compat.config import default_memory_share

KV_SPACE_ENV = "VLLM_CPU_KVCACHE_SPACE"
OF_FREE_MEMORY = 0.85
"""Share of the free memory for an engine whose weights are not in a folder, so that their size is not known."""
OTHER_PROCESSES = 4 << 30
"""Bytes for the server's processes other than the engine's worker, and for the host's processes."""
MOST_LEFT = 32 << 30
"""Largest number of bytes that are left to other programs."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
NOT_LOADED = ("consolidated", "training_args")
"""Beginnings of the names of files that hold the weights a second time, or hold no weights."""


def memory_share(args: Namespace, environ: Mapping[str, str]) -> float | None:
    """Return the share of all memory with which an engine on a CPU can run, or None to keep vLLM's or the user's.

    If all memory is free, some of it is left to the server's other processes. Other programs on the host may grow: then
    an engine takes its weights and half of the memory that is left. A host without free memory kills the engine, or
    stands still until vLLM takes it for dead.

    Args:
        args: arguments of `vllm serve`. Several engines or workers on one host are left alone: their user divides the
            memory.
        environ: the environment.
    """
    workers = args.data_parallel_size * args.tensor_parallel_size * args.pipeline_parallel_size
    chosen = args.kv_cache_memory_bytes is not None or KV_SPACE_ENV in environ
    if chosen or workers > 1 or not current_platform.is_cpu():
        return None
    if args.gpu_memory_utilization != EngineArgs.gpu_memory_utilization:
        return None
    memory = psutil.virtual_memory()
    wanted = memory.total * default_memory_share()
    if memory.available >= wanted:
        taken = memory.available - OTHER_PROCESSES
        return None if taken >= wanted else rounded(taken / memory.total)
    weights = weights_of(Path(args.model_tag or args.model))
    if weights is None:
        return rounded(OF_FREE_MEMORY * memory.available / memory.total)
    rest = max(memory.available - weights, 0)
    return rounded(min(weights + max(rest / 2, rest - MOST_LEFT), memory.available) / memory.total)


def rounded(share: float) -> float:
    """Round a share of the memory down to four digits."""
    return math.floor(share * 10_000) / 10_000


def weights_of(folder: Path) -> int | None:
    """Return the bytes of a model's weights in the first format that the folder has, or None if it is no folder."""
    if not folder.is_dir():
        return None
    for pattern in WEIGHTS:
        sizes = {file.name: file.stat().st_size for file in folder.glob(pattern) if file.is_file()}
        loaded = [size for name, size in sizes.items() if not name.startswith(NOT_LOADED)]
        if sizes:
            return sum(loaded or sizes.values())
    return 0
