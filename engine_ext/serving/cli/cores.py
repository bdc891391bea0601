"""Divides the cores of a host between its replicas.

By default, vLLM binds every data-parallel replica of a CPU host to all cores of the same NUMA node.
VLLM_CPU_OMP_THREADS_BIND gives each worker its own cores.
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
    """Equal, disjoint, contiguous parts in vLLM's notation; None where there are fewer cores than workers."""
    size = len(cores) // workers
    if not size:
        return None
    parts = (cores[worker * size : (worker + 1) * size] for worker in range(workers))
    return "|".join(",".join(map(str, part)) for part in parts)


def physical_cores() -> list[int]:
    """The cores that this process may run on. Of several threads of one physical core, the list has the first."""
    cores, seen = [], set()
    for core in sorted(os.sched_getaffinity(0)):
        siblings = Path(SIBLINGS.format(core))
        physical = siblings.read_text() if siblings.exists() else str(core)
        if physical not in seen:
            seen.add(physical)
            cores.append(core)
    return cores


def core_binding(args: Namespace, environ: Mapping[str, str]) -> str | None:
    """The value of VLLM_CPU_OMP_THREADS_BIND for these arguments of `vllm serve`; None: the variable stays as it is."""
    local = args.data_parallel_size_local
    replicas = args.data_parallel_size if local is None else local
    if replicas < 2 or CORES_ENV in environ or not current_platform.is_cpu():
        return None
    return split_cores(physical_cores(), replicas * args.tensor_parallel_size * args.pipeline_parallel_size)
