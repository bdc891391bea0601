"""Metrics of engine cores and workers, on the /metrics of the API server that started them.

Both are processes of their own. Where vLLM runs Prometheus in multiprocess mode they join it; else they write to a
directory of ours, which a collector in the API server reads at each scrape.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

DIRECTORY_ENV = "STARLING_METRICS_DIR"
MULTIPROCESS_ENV = "PROMETHEUS_MULTIPROC_DIR"


def use_multiprocess_values(directory: str) -> None:
    """Let metrics that this process makes from now on live in files under ``directory``.

    prometheus_client decides it at import, from an environment variable; a worker has imported it by then.
    Goes when prometheus_client takes the directory as an argument.
    """
    from prometheus_client import values

    os.environ[MULTIPROCESS_ENV] = directory
    values.ValueClass = values.get_value_class()


def report_to_front() -> None:
    """In a process that an API server has started: let metrics made from now on reach its /metrics."""
    if DIRECTORY_ENV in os.environ and MULTIPROCESS_ENV not in os.environ:
        use_multiprocess_values(os.environ[DIRECTORY_ENV])


class DirectoryCollector(Collector):
    """Reads the metrics of other processes from a directory, at each scrape."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def describe(self) -> Iterable:
        return []

    def collect(self) -> Iterable:
        return MultiProcessCollector(None, self.directory).collect()


@functools.cache
def collect_from_children() -> tempfile.TemporaryDirectory | None:
    """Show the metrics of the processes that this one is about to start; returns the directory they write to.

    None where vLLM has a directory already. A directory that this process has inherited is its parent's, whose
    /metrics shows other processes.
    """
    if MULTIPROCESS_ENV in os.environ:
        return None
    directory = tempfile.TemporaryDirectory(prefix="starling-metrics-")
    os.environ[DIRECTORY_ENV] = directory.name
    REGISTRY.register(DirectoryCollector(directory.name))
    return directory
