"""How much of a CPU host's memory an engine takes.

vLLM takes a share of all memory for the engine's worker, 92 % by default, and does not start where less is free.
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
"""Of an engine whose weights are not in a folder, so that their size is not known."""
OTHER_PROCESSES = 4 << 30
"""Bytes for the server's processes beside the engine's worker, and for the host's."""
MOST_LEFT = 32 << 30
"""Bytes that are left to other programs at most."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
NOT_LOADED = ("consolidated", "training_args")
"""How the names of files begin that have the weights once more, or none."""


def memory_share(args: Namespace, environ: Mapping[str, str]) -> float | None:
    """The share of all memory with which an engine on a CPU can run; None: vLLM's default can, or the user chose.

    Where all memory is free, some of it is left to the server's other processes. Where other programs use the host too,
    they may grow: an engine takes its weights and half of the memory that is left. A host without free memory kills the
    engine, or stands still until vLLM takes it for dead.

    Args:
        args: of `vllm serve`. Several engines or workers on one host are left alone: who starts these divides memory.
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
    """A share of the memory in four digits, and no more than it is."""
    return math.floor(share * 10_000) / 10_000


def weights_of(folder: Path) -> int | None:
    """The bytes of a model's weights, in the first format that the folder has; None: it is no folder of this host."""
    if not folder.is_dir():
        return None
    for pattern in WEIGHTS:
        sizes = {file.name: file.stat().st_size for file in folder.glob(pattern) if file.is_file()}
        loaded = [size for name, size in sizes.items() if not name.startswith(NOT_LOADED)]
        if sizes:
            return sum(loaded or sizes.values())
    return 0
