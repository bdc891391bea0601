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

from starling.vllm_compat.engine_core import divide_kv_memory_check
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
import multiprocessing, sys, time
sys.path[:0] = {path}

def core():
    from starling.vllm_compat.engine_core import end_with_parent
    end_with_parent()
    process = multiprocessing.current_process()
    print(f"{{process.pid}} {{process.name}}\\n", end="", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    children = [context.Process(target=core, name=name) for name in {names}]
    for child in children:
        child.start()
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_engine_core_ends_once_its_parent_is_killed_and_other_processes_go_on(tmp_path, method):
    names = ["EngineCore_DP0", "another", "EngineCore"]
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=sys.path, method=method, names=names))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=own_environment())
    lines = [parent.stdout.readline().split() for _ in names]
    children = {name: psutil.Process(int(pid)) for pid, name in lines}
    try:
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs([child for name, child in children.items() if name != "another"], timeout=300)
        assert not alive
        assert children["another"].is_running()
    finally:
        for child in children.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        parent.stdout.close()


COORDINATED = """
import sys, time
sys.path[:0] = {path}

if __name__ == "__main__":
    from vllm.config import ParallelConfig
    from vllm.v1.engine.coordinator import DPCoordinator
    from starling.vllm_compat.engine_core import end_coordinator_with_parent

    end_coordinator_with_parent()
    coordinator = DPCoordinator(ParallelConfig(data_parallel_size=2, data_parallel_size_local=2))
    print(coordinator.proc.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_the_coordinator_of_replicas_ends_once_its_parent_is_killed(tmp_path, method):
    script = tmp_path / "parent.py"
    script.write_text(COORDINATED.format(path=sys.path))
    environment = own_environment() | {"VLLM_WORKER_MULTIPROC_METHOD": method}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    coordinator = psutil.Process(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs([coordinator], timeout=300)
        assert not alive
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            coordinator.kill()
        parent.stdout.close()
