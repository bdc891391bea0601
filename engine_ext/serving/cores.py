"""Which cores each replica of one host computes on.

Left to itself, vLLM binds every data-parallel replica of a CPU host to the cores of the same NUMA node, all of them
to all of its cores; VLLM_CPU_OMP_THREADS_BIND gives each worker its own.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm.platforms import current_platform

CORES_ENV = "VLLM_CPU_OMP_THREADS_BIND"
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def split_cores(cores: Sequence[int], workers: int) -> str | None:
    """vLLM's notation of equal, disjoint, contiguous shares; None where there are fewer cores than workers."""
    share = len(cores) // workers
    if not share:
        return None
    shares = (cores[worker * share : (worker + 1) * share] for worker in range(workers))
    return "|".join(",".join(map(str, of_worker)) for of_worker in shares)


def physical_cores() -> list[int]:
    """The cores that this process may run on; of those that are threads of one physical core, the first."""
    cores, seen = [], set()
    for core in sorted(os.sched_getaffinity(0)):
        siblings = Path(SIBLINGS.format(core))
        shared = siblings.read_text() if siblings.exists() else str(core)
        if shared not in seen:
            seen.add(shared)
            cores.append(core)
    return cores


def core_binding(args: Namespace, environ: Mapping[str, str]) -> str | None:
    """What to set VLLM_CPU_OMP_THREADS_BIND to for these arguments of `vllm serve`; None: leave it as it is."""
    local = args.data_parallel_size_local
    replicas = args.data_parallel_size if local is None else local
    if replicas < 2 or CORES_ENV in environ or not current_platform.is_cpu():
        return None
    return split_cores(physical_cores(), replicas * args.tensor_parallel_size * args.pipeline_parallel_size)
