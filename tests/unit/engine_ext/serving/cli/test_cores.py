"""Cores of their own for the replicas of one host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from starling.engine_ext.serving.cli import cores


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
    assert cores.split_cores(available, workers) == binding


@pytest.mark.parametrize(
    ("replicas", "local", "tensor_parallel", "environ", "binding"),
    [
        (2, None, 1, {}, "0,1|2,3"),
        (2, None, 2, {}, "0|1|2|3"),
        (4, 2, 1, {}, "0,1|2,3"),
        (1, None, 1, {}, None),
        (2, 1, 1, {}, None),  # the other one is on another host
        (2, None, 1, {cores.CORES_ENV: "auto"}, None),
        (8, None, 1, {}, None),
    ],
)
def test_what_is_bound_follows_the_arguments(monkeypatch, replicas, local, tensor_parallel, environ, binding):
    monkeypatch.setattr(cores, "physical_cores", lambda: [0, 1, 2, 3])
    args = SimpleNamespace(
        data_parallel_size=replicas,
        data_parallel_size_local=local,
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=1,
    )
    assert cores.core_binding(args, environ) == binding


def test_threads_of_one_core_count_once(monkeypatch, tmp_path):
    for core, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        (tmp_path / str(core)).write_text(siblings)
    monkeypatch.setattr(cores, "SIBLINGS", str(tmp_path / "{}"))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cores.physical_cores() == [0, 1]
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {2, 5})
    assert cores.physical_cores() == [2, 5]  # of a core that the machine says nothing about
