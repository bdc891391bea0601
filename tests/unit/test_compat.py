"""The shims against the installed vLLM, and what happens beside another one."""

from __future__ import annotations

import asyncio
import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats

from engine_ext import compat, plugin


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.32.0", None),
        ("0.32.7+cpu", None),
        ("0.31.9", "outside the supported range >=0.32,<0.33"),
        ("0.33.0", "outside the supported range"),
        ("1.0", "outside the supported range"),
        (None, "not installed"),
    ],
)
def test_the_supported_range(version, problem):
    found = compat.version_problem(version)
    assert found is None if problem is None else problem in found and "install vllm>=0.32" in found


def test_this_vllm_is_supported_and_nothing_hides_our_packages():
    assert plugin.problem() is None


def test_an_intruder_is_named(monkeypatch, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "scheduler", raising=False)
    assert str(tmp_path / "scheduler") in compat.intruder()


def test_outside_the_range_the_plugin_hooks_nothing_and_options_fail(monkeypatch, caplog):
    """Registration warns and goes on; an engine that asks for Starling is told what to install."""
    hooks = []
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    monkeypatch.setattr(compat, "on_engine_config", lambda before, after: hooks.append(before))
    monkeypatch.setattr(plugin.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "vllm.starling"):
        plugin.register.__wrapped__()
    assert "0.31.0 is outside" in caplog.text
    (before,) = hooks
    before(type("Args", (), {"additional_config": {}}))
    with pytest.raises(ValueError, match=r"install vllm>=0\.32"):
        before(type("Args", (), {"additional_config": {"starling": {}}}))


def test_wrapping_twice_wraps_once():
    class Owner:
        def method(self):
            return ["original"]

        @classmethod
        def maker(cls, value):
            return [cls.__name__, value]

    def around(original):
        return lambda *args: [*original(*args), "wrapped"]

    for _ in range(2):
        compat.wrap(Owner, "method", around)
        compat.wrap(Owner, "maker", around)
    assert Owner().method() == ["original", "wrapped"]
    assert Owner.maker(3) == ["Owner", 3, "wrapped"]


def test_the_names_we_hook_are_there():
    """A new vLLM that moves one of these fails here first."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine import core
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    assert {"usage_context", "headless"} <= inspect.signature(EngineArgs.create_engine_config).parameters.keys()
    assert list(inspect.signature(AsyncEngineArgs.from_cli_args).parameters) == ["args"]
    assert "params" in inspect.signature(InputProcessor.process_inputs).parameters
    assert {"prompt", "sampling_params"} <= inspect.signature(AsyncLLM.generate).parameters.keys()
    builtin_tools = inspect.signature(OpenAIServingResponses._generate_with_builtin_tools).parameters
    assert {"engine_input", "sampling_params"} <= builtin_tools.keys()
    assert "get_request_block_hasher(" in inspect.getsource(core.EngineCore.__init__)
    assert list(inspect.signature(kv_cache_utils.get_request_block_hasher).parameters) == [
        "hash_block_size",
        "caching_hash_fn",
    ]
    for module in (kv_cache_utils, block_pool):
        assert list(inspect.signature(module.generate_block_hash_extra_keys).parameters) == [
            "request",
            "start_token_idx",
            "end_token_idx",
            "start_mm_idx",
        ]


@pytest.mark.parametrize(("kind", "hooked"), [("AsyncEngineArgs", True), ("EngineArgs", False)])
def test_a_server_that_only_makes_an_engine_is_hooked(kind, hooked, monkeypatch):
    """One of several API servers is a process of its own, which gets arguments that another one has parsed."""
    from vllm.engine import arg_utils

    callbacks, hooks = {}, []
    monkeypatch.setattr(compat, "on_engine_config", lambda before, after: callbacks.update(after=after))
    monkeypatch.setattr(compat, "on_server_args", lambda callback: None)
    monkeypatch.setattr(compat, "on_processed_request", lambda callback: None)
    monkeypatch.setattr(compat, "on_generate", lambda check, spread: hooks.append(spread.__name__))
    monkeypatch.setattr(compat, "on_beam_search", lambda callback: hooks.append(callback.__name__))
    plugin._hook_in()
    callbacks["after"](object.__new__(getattr(arg_utils, kind)), SimpleNamespace(additional_config={}))
    assert hooks == (["spread", "refuse_beam_search"] if hooked else [])


@pytest.mark.parametrize("shim", ["on_generate", "on_beam_search"])
def test_each_shim_is_still_needed(shim):
    """Fails when vLLM does by itself what the shim is for: then the shim can go."""
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine.async_llm import AsyncLLM

    if shim == "on_generate":
        assert inspect.isasyncgenfunction(inspect.unwrap(AsyncLLM.generate))
    else:
        assert "extra_args" not in BeamSearchParams.__struct_fields__


def test_an_engine_core_checks_its_memory_against_its_share_of_the_length(monkeypatch):
    from vllm.v1.engine import core

    seen = []

    def get_kv_cache_configs(vllm_config, *args):
        seen.append(vllm_config.model_config.max_model_len)
        if args:
            raise ValueError("too little")
        return "made"

    monkeypatch.setattr(core, "get_kv_cache_configs", get_kv_cache_configs)
    for _ in range(2):
        compat.divide_kv_memory_check(lambda config: config.parts)
    config = SimpleNamespace(parts=3, model_config=SimpleNamespace(max_model_len=1000, original_max_model_len=1000))
    assert core.get_kv_cache_configs(config) == "made"
    with pytest.raises(ValueError, match="too little"):
        core.get_kv_cache_configs(config, 1)
    assert config.model_config.max_model_len == 1000 and seen == [334, 334]
    config.parts = 1
    core.get_kv_cache_configs(config)
    config.parts, config.model_config.original_max_model_len = 3, -1
    core.get_kv_cache_configs(config)
    assert seen[2:] == [1000, 1000]


def test_what_is_told_before_a_layer_is_made_is_what_the_layer_says():
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.engine import core

    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32, get_head_size=lambda: 80),
        cache_config=SimpleNamespace(block_size=128, cache_dtype="auto"),
    )
    assert compat.cpu_attention_isa(config) == "vec16"
    assert "_get_attn_isa(" in inspect.getsource(cpu_attn.CPUAttentionMetadataBuilder.__init__)
    assert "get_kv_cache_configs(" in inspect.getsource(core.EngineCore._initialize_kv_caches)


def test_a_layer_of_ours_is_entered_once():
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    layer = object()
    compat.register_layer(config, "model.layers.0.state", layer)
    assert config.compilation_config.static_forward_context == {"model.layers.0.state": layer}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.state"):
        compat.register_layer(config, "model.layers.0.state", layer)


@pytest.mark.parametrize(
    ("ops", "after"), [(["a"], ["a", "our::op"]), (["our::op"], ["our::op"]), ([], []), (None, None)]
)
def test_the_graph_is_split_at_an_op_where_it_is_split_at_all(ops, after):
    config = SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=ops))
    compat.split_graph_at(config, "our::op")
    assert config.compilation_config.splitting_ops == after


def test_vllm_still_has_the_fields_that_layers_and_graphs_need():
    from vllm.config import CompilationConfig

    config = CompilationConfig()
    assert config.static_forward_context == {} and hasattr(config, "splitting_ops")


def test_an_op_of_ours_runs_and_is_made_once():
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    library = compat.register_op("starling::test_double", double, double)
    assert compat.register_op("starling::test_double", double, double) is library
    assert torch.ops.starling.test_double(torch.ones(2)).tolist() == [2, 2]


class UnseenEngine:
    """An AsyncLLM as far as run_unseen goes, on vLLM's own output processor."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=True, stream_interval=1)
        self.input_processor = SimpleNamespace(assign_request_id=InputProcessor.assign_request_id)
        self.engine_core = SimpleNamespace(add_request_async=self.add)
        self.added, self.aborted = [], []
        self._run_output_handler = lambda: None

    async def add(self, request) -> None:
        self.added.append(request)

    async def abort(self, request_id, internal) -> None:
        self.aborted.append((request_id, internal))
        self.output_processor.abort_requests([request_id], internal)


def unseen_request():
    return EngineCoreRequest(
        request_id="mine",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, detokenize=False),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_unseen_requests_end_with_their_output_and_are_in_no_statistics():
    async def scenario():
        engine = UnseenEngine()
        task = asyncio.create_task(compat.run_unseen(engine, unseen_request()))
        while not engine.added:
            await asyncio.sleep(0)
        (name,) = compat.engine_request_ids(engine, "mine")
        assert name == engine.added[0].request_id != "mine"
        assert engine.output_processor.get_num_unfinished_requests() == 0
        stats = IterationStats()
        done = EngineCoreOutput(
            request_id=name, new_token_ids=[7], finish_reason=FinishReason.LENGTH, kv_transfer_params={"pages": [4]}
        )
        engine.output_processor.process_outputs([done], 1.0, stats)
        output = await task
        assert output.kv_transfer_params == {"pages": [4]}
        assert (stats.num_prompt_tokens, stats.num_generation_tokens, stats.finished_requests) == (0, 0, [])
        assert engine.aborted == []

    asyncio.run(scenario())


def test_unseen_requests_are_aborted_when_cancelled_and_by_the_id_they_were_given():
    async def scenario():
        engine = UnseenEngine()
        task = asyncio.create_task(compat.run_unseen(engine, unseen_request()))
        while not engine.added:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.aborted == [(engine.added[0].request_id, True)]

        task = asyncio.create_task(compat.run_unseen(engine, unseen_request()))
        while len(engine.added) < 2:
            await asyncio.sleep(0)
        engine.output_processor.abort_requests(["mine"], internal=False)
        assert (await task).outputs[0].finish_reason == "abort"

    asyncio.run(scenario())
