"""Metrics of engine cores and workers, on the /metrics of the API server, and readings of an engine.

Both are processes of their own. Where vLLM runs Prometheus in multiprocess mode they join it; else they write to a
directory of ours, which a collector in the API server reads at each scrape.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from prometheus_client import REGISTRY, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from starling.vllm_compat.patching import touches

logger = logging.getLogger("vllm.starling")

DIRECTORY_ENV = "STARLING_METRICS_DIR"
MULTIPROCESS_ENV = "PROMETHEUS_MULTIPROC_DIR"
FILE_BYTES = 1 << 20
"""Bytes of a new file of metrics: several thousand series. Only a larger file grows without having its blocks."""


def allocate(path: str) -> None:
    """Make a file of FILE_BYTES whose blocks are there, or no file (raises OSError)."""
    new = f"{path}.new"  # the collector reads files that end with .db
    try:
        with open(new, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        os.rename(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


class AllocatedFile(MmapedDict):
    """A process's file of metrics that has its blocks before it is written; in memory where the disk has none.

    prometheus_client maps a file without blocks. On a full disk the first write then ends the process with SIGBUS.
    Goes when prometheus_client allocates its files.
    """

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if not read_mode and not os.path.exists(filename):
            try:
                allocate(filename)
            except OSError as error:
                warn_of_missing_metrics(error)
                filename = f"/proc/self/fd/{os.memfd_create('starling-metrics')}"
        super().__init__(filename, read_mode)


_warned: set[int] = set()  # the ids of this process and of those that it was forked from


def warn_of_missing_metrics(error: OSError) -> None:
    """Say once in each process why metrics are missing on /metrics."""
    if os.getpid() not in _warned:
        _warned.add(os.getpid())
        logger.warning(
            "Metrics of process %d are missing on /metrics: %s. The server runs without them. Free some space there, "
            "or set TMPDIR to another directory.",
            os.getpid(),
            error,
        )


def use_allocated_files() -> None:
    """Let prometheus_client write this process's metrics to files whose blocks are there."""
    values.MmapedDict = AllocatedFile  # type: ignore[misc]


def use_multiprocess_values(directory: str) -> None:
    """Let metrics that this process makes from now on live in files under ``directory``.

    prometheus_client decides it at import, from an environment variable; a worker has imported it by then.
    Goes when prometheus_client takes the directory as an argument.
    """
    os.environ[MULTIPROCESS_ENV] = directory
    use_allocated_files()
    values.ValueClass = values.get_value_class()


def report_to_front() -> None:
    """Let metrics made from now on reach the /metrics of the API server that has started this process."""
    directory = os.environ.get(MULTIPROCESS_ENV) or os.environ.get(DIRECTORY_ENV)
    if directory is None:
        return
    # A process that was forked has its parent's, which may have imported prometheus_client before it had a directory.
    if values.ValueClass is values.MutexValue:
        use_multiprocess_values(directory)
    else:
        use_allocated_files()


class DirectoryCollector(Collector):
    """Reads the metrics of other processes from a directory, at each scrape."""

    def __init__(self, directory: str) -> None:
        self.directory, self.is_lost = directory, False

    def describe(self) -> Iterable:
        return []

    def collect(self) -> Iterable:
        """Yield the metrics; none where the directory is gone, so that /metrics still shows those of this process."""
        try:
            return MultiProcessCollector(None, self.directory).collect()
        except (ValueError, OSError) as error:  # some systems clear old files from their temporary directory
            if not self.is_lost:
                logger.warning("The metrics of engines and workers are missing on /metrics: %s", error)
            self.is_lost = True
            return ()


@functools.cache
def collect_from_children() -> tempfile.TemporaryDirectory | None:
    """Show the metrics of the processes that this one is about to start; returns the directory they write to.

    None where vLLM has a directory already, or none can be made. A directory that this process has inherited is its
    parent's, whose /metrics shows other processes.
    """
    if MULTIPROCESS_ENV in os.environ:
        use_allocated_files()
        return None
    os.environ.pop(DIRECTORY_ENV, None)
    try:
        directory = tempfile.TemporaryDirectory(prefix="starling-metrics-")
    except OSError as error:
        warn_of_missing_metrics(error)
        return None
    os.environ[DIRECTORY_ENV] = directory.name
    REGISTRY.register(DirectoryCollector(directory.name))
    return directory


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
