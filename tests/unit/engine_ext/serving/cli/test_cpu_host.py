"""Cores of their own for the replicas of one host."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from starling.engine_ext.serving.cli import cpu_host


@pytest.mark.parametrize(
    ("available", "workers", "binding"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 2, 4, 6, 8], 2, "0,2|4,6"),
        (list(range(8)), 4, "0,1|2,3|4,5|6,7"),
        ([3], 2, None),
        ([], 1, None),
    ],
)
def test_shares_are_equal_and_disjoint(available, workers, binding):
    assert cpu_host.split_cores(available, workers) == binding


@pytest.mark.parametrize(
    ("replicas", "local", "tensor_parallel", "environ", "binding"),
    [
        (2, None, 1, {}, "0,1|2,3"),
        (2, None, 2, {}, "0|1|2|3"),
        (4, 2, 1, {}, "0,1|2,3"),
        (1, None, 1, {}, None),
        (2, 1, 1, {}, None),  # the other one is on another host
        (2, None, 1, {cpu_host.CORES_ENV: "auto"}, None),
        (8, None, 1, {}, None),
    ],
)
def test_what_is_bound_follows_the_arguments(monkeypatch, replicas, local, tensor_parallel, environ, binding):
    monkeypatch.setattr(cpu_host, "physical_cores", lambda: [0, 1, 2, 3])
    args = SimpleNamespace(
        data_parallel_size=replicas,
        data_parallel_size_local=local,
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=1,
    )
    assert cpu_host.core_binding(args, environ, set()) == binding


@pytest.mark.parametrize(
    ("replicas", "bound", "binding"),
    [
        (1, {0}, "1,2,3"),
        (1, {0, 1, 2}, "3"),
        (1, {0, 1, 2, 3}, None),
        (1, {9}, "0,1,2,3"),  # a core that this server may not use
        (2, {0}, "1|2"),
        (2, {0, 1, 2}, "0,1|2,3"),  # too few are left
    ],
)
def test_cores_that_another_engine_has_bound_are_left_to_it(monkeypatch, replicas, bound, binding):
    monkeypatch.setattr(cpu_host, "physical_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(cpu_host, "physical", str)
    monkeypatch.setattr(cpu_host, "node_of", lambda core: "node0")
    args = SimpleNamespace(data_parallel_size=replicas, data_parallel_size_local=None)
    args.tensor_parallel_size = args.pipeline_parallel_size = 1
    assert cpu_host.core_binding(args, {}, bound) == binding


def test_another_thread_of_a_bound_core_is_bound_too(monkeypatch, tmp_path):
    for core, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        (tmp_path / str(core)).write_text(siblings)
    monkeypatch.setattr(cpu_host, "SIBLINGS", str(tmp_path / "{}"))
    assert cpu_host.free_cores([0, 1], {2}) == [1]


def test_a_worker_uses_the_cores_of_one_memory_node(monkeypatch, tmp_path):
    for core, node in {0: 0, 1: 1, 2: 1}.items():
        (tmp_path / str(core) / f"node{node}").mkdir(parents=True)
    monkeypatch.setattr(cpu_host, "NODE", str(tmp_path / "{}"))
    assert cpu_host.on_one_node([0, 1, 2]) == [1, 2]
    assert cpu_host.on_one_node([]) == []


WORKER = """
import os, sys, threading, time
from setproctitle import setproctitle

os.sched_setaffinity(0, {int(sys.argv[1])})
setproctitle(sys.argv[2])
print(flush=True)
time.sleep(600)
"""


def test_what_workers_of_this_host_are_bound_to_is_found(monkeypatch):
    core = max(os.sched_getaffinity(0))
    monkeypatch.setattr(cpu_host, "WORKER", "VLLM::Test")
    for title, found in (("VLLM::Test_TP0", {core}), ("another", set())):
        command = [sys.executable, "-c", WORKER, str(core), title]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            try:
                assert cpu_host.bound_cores() == found
            finally:
                process.kill()


def test_threads_of_one_core_count_once(monkeypatch, tmp_path):
    for core, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        (tmp_path / str(core)).write_text(siblings)
    monkeypatch.setattr(cpu_host, "SIBLINGS", str(tmp_path / "{}"))
    monkeypatch.setattr(cpu_host.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cpu_host.physical_cores() == [0, 1]
    monkeypatch.setattr(cpu_host.os, "sched_getaffinity", lambda pid: {2, 5})
    assert cpu_host.physical_cores() == [2, 5]  # of a core that the machine says nothing about
