"""Runs a job of tests/parity/engine_job.py on the fake GPU, in an engine with a library and replicas, to its end.

The host is one without AVX-512 and AMX. What vLLM has for CPUs alone is none of the engine's business. The job fails
where a traceback is logged at the end.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from typing import Any

import torch


class HostAgent:
    """A NIXL agent that takes the memory of the fake GPU for what it is, the host's."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent

    def register_memory(self, regions: Any, memory: str) -> Any:
        return self.agent.register_memory(regions, "DRAM")

    def get_xfer_descs(self, ranges: Any, memory: str) -> Any:
        return self.agent.get_xfer_descs(ranges, "DRAM")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.agent, name)


class Tracebacks(logging.Handler):
    """Keeps the records of the log that have a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.records.append(logging.Formatter().format(record))


def swap_blocks_batch(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, *_: Any) -> None:
    """vLLM's copy of pages between the memories of host and GPU, which are (copies,) addresses and bytes."""
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, size)


def install() -> None:
    """Replace what connectors call of a GPU, and the host's features."""
    from vllm.v1.kv_offload.cpu import gpu_worker

    from starling.features.replicas import page_transfer
    from tests.gpu_shim.cuda import Event

    make_agent = page_transfer.make_agent
    page_transfer.make_agent = lambda name: HostAgent(make_agent(name))
    gpu_worker.host_register = lambda address, num_bytes: False  # so that the GPU's kernels don't read the memory
    torch.Event = Event
    torch.ops._C_cache_ops.swap_blocks_batch = swap_blocks_batch
    torch.cpu._is_avx512_supported = torch.cpu._is_amx_tile_supported = lambda: False


def main() -> None:
    from tests.gpu_shim.start import start
    from tests.parity import engine_job

    start()
    install()
    engine_job.leave_out_compilation()
    llm = engine_job.run_job(json.loads(sys.argv[1]))
    tracebacks = Tracebacks()
    logger = logging.getLogger("vllm")  # the start of an engine sets its level and handlers
    logger.setLevel(logging.WARNING)
    logger.addHandler(tracebacks)
    llm.llm_engine.engine_core.shutdown()
    assert not tracebacks.records, "\n".join(tracebacks.records)
