"""Division of a host's cores between its replicas, and between its servers.

By default, vLLM binds every data-parallel replica of a CPU host to all cores of the same NUMA node, and every server to
the same ones. VLLM_CPU_OMP_THREADS_BIND gives each worker its own cores.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from vllm.platforms import current_platform

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
