"""Hooks around vLLM's configuration, and the private fields that Starling reads."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CacheConfig, CompilationConfig
from vllm.config.parallel import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.utils import record_kv_cache_layout

from starling.vllm_compat.config import (
    attention_layer,
    cpu_attention_isa,
    is_async_engine,
    memory_nodes,
    num_api_servers,
    on_engine_config,
    on_server_args,
    page_layout,
    page_size_before_start,
    share_memory_nodes,
    split_graph_at,
)


def test_the_names_that_are_hooked_are_there():
    """A new vLLM that moves one of these fails here first."""
    assert {"usage_context", "headless"} <= inspect.signature(EngineArgs.create_engine_config).parameters.keys()
    assert list(inspect.signature(AsyncEngineArgs.from_cli_args).parameters) == ["args"]


def test_an_engines_configuration_is_seen_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, *args: events.append(args) or "config")
    args = object.__new__(EngineArgs)
    for _ in range(2):
        on_engine_config(lambda seen: events.append(("before", seen)), lambda *seen: events.append(("after", *seen)))
    assert args.create_engine_config(1) == "config"
    assert events == [("before", args), (1,), ("after", args, "config")]


def test_a_servers_arguments_are_seen_before_its_engine_is_made(monkeypatch):
    events = []
    made = classmethod(lambda cls, args: events.append("made") or (cls, args))
    monkeypatch.setattr(AsyncEngineArgs, "from_cli_args", made)
    on_server_args(lambda args: events.append(args))
    assert AsyncEngineArgs.from_cli_args("arguments") == (AsyncEngineArgs, "arguments")
    assert events == ["arguments", "made"]


def test_arguments_of_servers_differ_from_those_of_offline_engines():
    assert is_async_engine(object.__new__(AsyncEngineArgs))
    assert not is_async_engine(object.__new__(EngineArgs))


def test_vllm_still_has_the_private_fields():
    config = CompilationConfig()
    assert config.static_forward_context == {}
    assert hasattr(config, "splitting_ops")
    assert num_api_servers(SimpleNamespace(parallel_config=ParallelConfig())) == 1


def test_the_instruction_set_known_before_a_layer_is_made_is_that_of_the_layer():
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32, get_head_size=lambda: 80),
        cache_config=SimpleNamespace(block_size=128, cache_dtype="auto"),
    )
    assert cpu_attention_isa(config) == "vec16"
    assert "_get_attn_isa(" in inspect.getsource(cpu_attn.CPUAttentionMetadataBuilder.__init__)


@pytest.mark.parametrize(
    ("isa", "order", "layout"),
    [
        ({}, "LBHNC", "CPU_ATTN/any/auto/LBHNC"),
        ({"isa": "vec"}, "LBHNC", "CPU_ATTN/vec/auto/LBHNC"),
        ({}, "LBNHC", "CPU_ATTN/any/auto/LBNHC"),
    ],
)
def test_the_layout_of_a_layers_pages(isa, order, layout):
    backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    layer = SimpleNamespace(get_attn_backend=lambda: backend, **isa)
    cache = CacheConfig()
    record_kv_cache_layout(cache, order)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"layers.0": layer}), cache_config=cache
    )
    assert page_layout(config, "layers.0", "auto") == layout
    assert attention_layer(config, "layers.0") is layer


@pytest.mark.parametrize(
    ("ops", "after"), [(["a"], ["a", "our::op"]), (["our::op"], ["our::op"]), ([], []), (None, None)]
)
def test_the_graph_is_split_at_an_op_where_it_is_split_at_all(ops, after):
    config = SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=ops))
    split_graph_at(config, "our::op")
    assert config.compilation_config.splitting_ops == after


@pytest.mark.parametrize(
    ("device", "user_size", "num_pages", "page_size"),
    [("cpu", False, None, 128), ("cpu", True, None, 16), ("cpu", False, 100, 16), ("cuda", False, None, 16)],
)
def test_the_page_size_of_cpus_is_known_before_the_model_is_loaded(device, user_size, num_pages, page_size):
    cache = SimpleNamespace(block_size=16, user_specified_block_size=user_size, num_gpu_blocks=num_pages)
    config = SimpleNamespace(cache_config=cache, device_config=SimpleNamespace(device_type=device))
    assert page_size_before_start(config) == page_size


@pytest.mark.parametrize(
    ("replicas", "local", "world_size", "nodes", "device", "environ", "added"),
    [
        (2, 2, 1, {0}, "cpu", {}, {"VLLM_CPU_SIM_MULTI_NUMA": "0"}),
        (2, 2, 2, {0, 1}, "cpu", {}, {"VLLM_CPU_SIM_MULTI_NUMA": "0"}),
        (2, 2, 1, {1, 2}, "cpu", {}, {"VLLM_CPU_SIM_MULTI_NUMA": "0"}),
        (2, 2, 1, {0, 1}, "cpu", {}, {}),
        (2, 1, 1, {0}, "cpu", {}, {}),  # the other one is on another host
        (1, 1, 2, {0}, "cpu", {}, {}),
        (2, 2, 1, {0}, "cuda", {}, {}),
        (2, 2, 1, {0}, "cpu", {"VLLM_CPU_SIM_MULTI_NUMA": "1"}, {}),
        (2, 2, 1, {0}, "cpu", {"CPU_VISIBLE_MEMORY_NODES": "0"}, {}),
    ],
)
def test_replicas_share_memory_nodes_where_there_are_too_few(
    monkeypatch, replicas, local, world_size, nodes, device, environ, added
):
    monkeypatch.setattr("starling.vllm_compat.config.memory_nodes", lambda: nodes)
    parallel = {"data_parallel_size": replicas, "data_parallel_size_local": local, "world_size": world_size}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), device_config=SimpleNamespace(device_type=device)
    )
    after = dict(environ)
    share_memory_nodes(config, after)
    assert after == environ | added


def test_a_process_may_use_at_least_one_memory_node():
    assert memory_nodes()
