"""Readings that a measurement takes of an engine that runs in this process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from starling.vllm_compat.patching import touches


@touches(
    "vllm.v1.engine.llm_engine.LLMEngine.logger_manager",
    "vllm.v1.metrics.loggers.StatLoggerManager.stat_loggers",
    "vllm.v1.metrics.stats.SchedulerStats.cudagraph_stats",
    "vllm.compilation.cuda_graph.CUDAGraphStat.runtime_mode",
)
def count_graphs(engine: Any) -> Counter[str]:
    """Count an engine's later steps by the mode of their CUDA graphs: "FULL", "PIECEWISE" or "NONE".

    vllm.LLM takes no stat loggers, as AsyncLLM does, and its metrics do not have the mode. Goes when they have.

    Args:
        engine: an LLMEngine with statistics and with ``cudagraph_metrics``.
    """
    from vllm.v1.metrics.loggers import StatLoggerBase

    counts: Counter[str] = Counter()

    class GraphCounter(StatLoggerBase):
        def __init__(self) -> None:
            pass

        def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            stat = getattr(scheduler_stats, "cudagraph_stats", None)
            if stat is not None:
                counts[stat.runtime_mode] += 1

        def log_engine_initialized(self) -> None:
            pass

    engine.logger_manager.stat_loggers.append(GraphCounter())
    return counts


@touches("vllm.v1.worker.gpu_worker.Worker.{requested_memory, peak_activation_memory}")
def gpu_memory(worker: Any) -> dict[str, int] | None:
    """Return the bytes of a worker's GPU, or None on a CPU. To be sent by ``collective_rpc``.

    vLLM logs what its profile found, and returns it nowhere. Goes when a worker has a method for it.

    Returns:
        ``allocated`` by torch now; ``peak`` and ``reserved``, the most that torch had allocated and reserved since the
        last call; ``requested``, what vLLM may take in all; ``profiled``, what it keeps free for activations, both 0
        where vLLM has made no profile.
    """
    if not torch.cuda.is_available():
        return None
    found = {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "requested": int(getattr(worker, "requested_memory", 0)),
        "profiled": int(getattr(worker, "peak_activation_memory", 0)),
    }
    torch.cuda.reset_peak_memory_stats()
    return found
