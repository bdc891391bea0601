"""Hooks around vLLM's configuration, and the private fields that Starling reads."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationConfig
from vllm.config.parallel import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.attention.backends import cpu_attn

from vllm_compat.config import (
    attention_layer,
    cpu_attention_isa,
    is_async_engine,
    num_api_servers,
    on_engine_config,
    on_server_args,
    page_layout,
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


@pytest.mark.parametrize(("isa", "layout"), [({}, "CPU_ATTN/any/auto"), ({"isa": "vec"}, "CPU_ATTN/vec/auto")])
def test_the_layout_of_a_layers_pages(isa, layout):
    backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
    layer = SimpleNamespace(get_attn_backend=lambda: backend, **isa)
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layers.0": layer}))
    assert page_layout(config, "layers.0", "auto") == layout
    assert attention_layer(config, "layers.0") is layer


@pytest.mark.parametrize(
    ("ops", "after"), [(["a"], ["a", "our::op"]), (["our::op"], ["our::op"]), ([], []), (None, None)]
)
def test_the_graph_is_split_at_an_op_where_it_is_split_at_all(ops, after):
    config = SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=ops))
    split_graph_at(config, "our::op")
    assert config.compilation_config.splitting_ops == after
