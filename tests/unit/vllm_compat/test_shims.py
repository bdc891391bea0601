"""Shims for one release of vLLM are still needed. A failure here says what can be removed."""

from __future__ import annotations

import inspect
import json

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils import cpu_resource_utils

from benchmarks.random_llama import make_random_llama
from starling.vllm_compat.versions import VLLM_MIN, release_of, vllm_version
from tests.parity.harness import TINY
from vllm_names import names

INSTALLED = release_of(vllm_version() or "")
TABLES = [json.loads(file.read_text()) for file in sorted(names.TABLES.glob("names-*.json"))]
FOR_0_32 = (
    "vllm_compat/server_socket.py",
    "the branch of vllm_compat.config.kv_cache_capacity",
    "the branch of vllm_compat.prefix_cache.use_request_hasher and of SchedulerHooks._get_local_prefix_cache_hit",
    "PrefillLimiter.without_adapter",
    "getattr in engine_ext/serving/grpc/messages.py: every EngineDeadError has a CLIENT_MESSAGE",
)


def test_vllm_0_32_is_supported():
    assert VLLM_MIN <= (0, 32), f"remove what only vLLM 0.32 needs: {'; '.join(FOR_0_32)}"


def test_every_place_of_a_name_that_moved_is_that_of_a_supported_release():
    calls = [use for use in names.read_project(names.ROOT).uses if use.kind == "moved"]
    moved = [{entry["name"] for entry in table["names"] if "moved" in entry["kinds"]} for table in TABLES]
    assert calls and {use.name for use in calls} == set.union(*moved)
    assert all(table ^ set.union(*moved) for table in moved), "first_found is not needed: every release has every name"


@pytest.mark.skipif(INSTALLED < (0, 33), reason="before vLLM 0.33 the configuration has the page size")
def test_the_page_size_of_cpus_is_not_in_the_configuration_before_the_start(tmp_path):
    model = str(make_random_llama(tmp_path / "tiny", **TINY))
    config = EngineArgs(model=model, dtype="float32").create_engine_config()
    assert config.cache_config.block_size != 128, "starling.vllm_compat.config.page_size_before_start is not needed"


@pytest.mark.skipif(INSTALLED < (0, 33), reason="before vLLM 0.33 replicas are not bound to memory nodes")
def test_a_replica_without_a_memory_node_of_its_own_gets_none(monkeypatch):
    assert "assigned_node_ids" in inspect.signature(cpu_resource_utils.get_visible_memory_node).parameters
    monkeypatch.setattr(cpu_resource_utils, "get_memory_affinity", lambda: [0])
    monkeypatch.delenv("VLLM_CPU_SIM_MULTI_NUMA", raising=False)
    assert cpu_resource_utils.get_visible_memory_node([1]) == [], "share_memory_nodes is not needed"
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    assert cpu_resource_utils.get_visible_memory_node([1]) == [0], "share_memory_nodes has no effect"
