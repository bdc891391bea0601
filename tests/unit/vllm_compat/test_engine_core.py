"""The engine core's check of its KV memory, and its end with its parent.

Its utilities are tested in tests/unit/scheduler/test_core_rpc.py.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from vllm.v1.engine import core

from starling.vllm_compat.core_process import divide_kv_memory_check
from starling.vllm_compat.metrics import DIRECTORY_ENV


def test_an_engine_core_checks_its_memory_against_its_part_of_the_length(monkeypatch):
    checked = []

    def get_kv_cache_configs(vllm_config, *args):
        checked.append(vllm_config.model_config.max_model_len)
        if args:
            raise ValueError("too little")
        return "made"

    monkeypatch.setattr(core, "get_kv_cache_configs", get_kv_cache_configs)
    for _ in range(2):
        divide_kv_memory_check(lambda config: config.parts)
    config = SimpleNamespace(parts=3, model_config=SimpleNamespace(max_model_len=1000, original_max_model_len=1000))
    assert core.get_kv_cache_configs(config) == "made"
    with pytest.raises(ValueError, match="too little"):
        core.get_kv_cache_configs(config, 1)
    assert config.model_config.max_model_len == 1000
    assert checked == [334, 334]
    config.parts = 1
    core.get_kv_cache_configs(config)
    config.parts, config.model_config.original_max_model_len = 3, -1
    core.get_kv_cache_configs(config)
    assert checked[2:] == [1000, 1000]


def test_the_engine_core_calls_the_check_by_its_modules_name():
    assert "get_kv_cache_configs(" in inspect.getsource(core.EngineCore._initialize_kv_caches)


def own_environment() -> dict[str, str]:
    """Without the folder of this process's metrics, which an engine core removes once its parent is killed."""
    return {name: value for name, value in os.environ.items() if name != DIRECTORY_ENV}


PARENT = """
import multiprocessing, os, sys, time
sys.path[:0] = {path}

from vllm.config import ParallelConfig
from vllm.v1.engine.coordinator import DPCoordinator
from vllm.v1.engine.core import EngineCoreProc
from starling.vllm_compat.core_process import end_children_with_parent

def core():
    print(os.getpid(), flush=True)
    time.sleep(600)  # as an engine core that waits for its front, at its start

EngineCoreProc.run_engine_core = staticmethod(core)

if __name__ == "__main__":
    end_children_with_parent()
    end_children_with_parent()
    coordinator = DPCoordinator(ParallelConfig(data_parallel_size=2, data_parallel_size_local=2))
    print(coordinator.proc.pid, flush=True)
    multiprocessing.get_context({method!r}).Process(target=EngineCoreProc.run_engine_core).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_starting_engine_core_and_the_coordinator_end_once_their_parent_is_killed(tmp_path, method):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=sys.path, method=method))
    environment = own_environment() | {"VLLM_WORKER_MULTIPROC_METHOD": method}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    try:
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=300)
        assert not alive
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        parent.stdout.close()
