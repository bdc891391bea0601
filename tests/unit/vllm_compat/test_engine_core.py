"""The engine core's check of its KV memory; its utilities are tested in tests/unit/scheduler/test_core_rpc.py."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from vllm.v1.engine import core

from vllm_compat.engine_core import divide_kv_memory_check


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
