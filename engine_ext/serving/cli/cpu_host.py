"""Division of a CPU host's cores and memory between its replicas, and between its servers.

By default, vLLM binds every data-parallel replica of a CPU host to all cores of the same NUMA node, and every server to
the same ones. VLLM_CPU_OMP_THREADS_BIND gives each worker its own cores.
"""

from __future__ import annotations

import contextlib
import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from starling.vllm_compat.config import default_memory_share

CORES_ENV = "VLLM_CPU_OMP_THREADS_BIND"
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
NODE = "/sys/devices/system/cpu/cpu{}"
WORKER = "VLLM::Worker"  # begins the titles of vLLM's workers


def split_cores(cores: Sequence[int], workers: int) -> str | None:
    """Return equal, disjoint, contiguous parts in vLLM's notation, or None if there are fewer cores than workers."""
    size = len(cores) // workers
    if not size:
        return None
    parts = (cores[worker * size : (worker + 1) * size] for worker in range(workers))
    return "|".join(",".join(map(str, part)) for part in parts)


def physical_cores() -> list[int]:
    """Return the cores that this process may run on, with only the first of several threads of one physical core."""
    cores: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        cores.setdefault(physical(core), core)
    return list(cores.values())


def physical(core: int) -> str:
    """Return a text that is the same for all threads of one physical core."""
    siblings = Path(SIBLINGS.format(core))
    return siblings.read_text() if siblings.exists() else str(core)


def bound_cores() -> set[int]:
    """Return the cores that workers of other engines of this host are bound to, as far as this process can see them."""
    bound: set[int] = set()
    for process in psutil.process_iter():
        # A process may end meanwhile, or be hidden from this user.
        with contextlib.suppress(psutil.Error, OSError):
            if " ".join(process.cmdline()).startswith(WORKER):
                allowed = os.sched_getaffinity(process.ppid())
                threads = (os.sched_getaffinity(thread.id) for thread in process.threads())
                bound.update(*(cores for cores in threads if cores < allowed))
    return bound


def free_cores(cores: Sequence[int], bound: set[int]) -> list[int]:
    """Return the cores none of whose threads is bound."""
    taken = set(map(physical, bound))
    return [core for core in cores if physical(core) not in taken]


def on_one_node(cores: Sequence[int]) -> list[int]:
    """Return the cores on the memory node that most of them share."""
    nodes = {core: node_of(core) for core in cores}
    most = Counter(nodes.values()).most_common(1)
    return [core for core in cores if nodes[core] == most[0][0]]


def node_of(core: int) -> str:
    """Return the memory node of a core, or "" if the machine does not say."""
    return next((path.name for path in Path(NODE.format(core)).glob("node*")), "")


def core_binding(args: Namespace, environ: Mapping[str, str], bound: set[int]) -> str | None:
    """Return VLLM_CPU_OMP_THREADS_BIND for these arguments of `vllm serve`, or None to leave the variable as it is.

    Args:
        args: parsed arguments of `vllm serve`.
        environ: the environment.
        bound: result of ``bound_cores``.
    """
    local = args.data_parallel_size_local
    replicas = args.data_parallel_size if local is None else local
    if CORES_ENV in environ or not current_platform.is_cpu():
        return None
    cores, workers = physical_cores(), replicas * args.tensor_parallel_size * args.pipeline_parallel_size
    free = free_cores(cores, bound)
    others = split_cores(on_one_node(free) if workers == 1 else free, workers) if bound else None
    return others or (split_cores(cores, workers) if replicas > 1 else None)


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
