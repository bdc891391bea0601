"""What `--star-adapter` sets and refuses before an engine starts, through vLLM's own EngineArgs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from vllm.config import CompilationMode
from vllm.engine.arg_utils import EngineArgs

from benchmarks.random_llama import make_random_llama
from starling.config.adapter import AdapterError, read_adapter
from starling.config.parsing import OptionError
from starling.engine_ext.start import plugin
from starling.features.adapter.lora import NUMBER, own_adapter
from tests.adapters import make_adapter
from tests.parity.harness import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY)


@pytest.fixture(autouse=True)
def nothing_read_before():
    read_adapter.cache_clear()


def engine_config(model, adapter, **arguments):
    entry = {"starling": {"star_adapter": str(adapter)}}
    arguments = {"enforce_eager": True, "dtype": "float32"} | arguments
    return EngineArgs(model=str(model), additional_config=entry, **arguments).create_engine_config()


def test_an_engine_without_lora_gets_it_in_the_adapters_layers_alone(model, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model, rank=4, modules=("q_proj", "v_proj"))
    config = engine_config(model, adapter)
    lora = config.lora_config
    assert (lora.max_loras, lora.max_lora_rank, lora.target_modules) == (1, 8, ["q_proj", "v_proj"])
    named = own_adapter(config)
    assert named.lora_int_id == NUMBER and named.lora_path == str(adapter)
    assert named.lora_name == f"starling-{read_adapter(str(adapter)).digest}"


def test_a_server_with_loras_keeps_as_many_beside_it(model, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model)
    lora = engine_config(model, adapter, enable_lora=True, max_loras=2, max_cpu_loras=3, max_lora_rank=64).lora_config
    assert (lora.max_loras, lora.max_cpu_loras, lora.max_lora_rank, lora.target_modules) == (3, 4, 64, None)


def test_a_model_with_lora_is_compiled_on_a_cpu_where_starling_is_activated(model, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model)
    compiled = engine_config(model, adapter, enforce_eager=False)
    plain = EngineArgs(model=str(model), dtype="float32").create_engine_config()
    assert compiled.compilation_config.mode == plain.compilation_config.mode != CompilationMode.NONE
    assert compiled.lora_config is not None
    assert engine_config(model, adapter).compilation_config.mode == CompilationMode.NONE, "with enforce_eager"
    without = EngineArgs(model=str(model), dtype="float32", enable_lora=True, max_lora_rank=8).create_engine_config()
    assert without.compilation_config.mode == CompilationMode.NONE, "as vLLM has it"


def test_another_adapter_has_another_name(model, tmp_path):
    digests = {
        read_adapter(str(make_adapter(tmp_path / str(seed), model, seed=seed, **made))).digest
        for seed, made in ((1, {}), (2, {}), (3, {"purposes": ["star"]}))
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("made", "arguments", "words"),
    [
        ({"rank": 32}, {}, "its rank of 32 is above --max-lora-rank 16. Allowed: --max-lora-rank 32"),
        (
            {"rank": 9},
            {"enable_lora": True, "max_lora_rank": 8},
            "is above --max-lora-rank 8. Allowed: --max-lora-rank 16",
        ),
        ({"checkpoint": "0" * 32, "model": "another"}, {}, "it is an adapter of another, with other weights than"),
        ({"purposes": ["retrieval"]}, {}, "purposes.0: Input should be 'documents' or 'star'"),
        ({"version": 2}, {}, "version: Input should be 1"),
        (
            {"modules": ("q_proj", "up_proj")},
            {"enable_lora": True, "lora_target_modules": ["q_proj"]},
            "it changes up_proj, which --lora-target-modules leaves out",
        ),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "it is for documents: speculative",
        ),
    ],
)
def test_what_can_not_be_used_is_refused(model, tmp_path, made, arguments, words):
    adapter = make_adapter(tmp_path / "adapter", model, **made)
    with pytest.raises(OptionError) as raised:
        engine_config(model, adapter, **arguments)
    assert str(raised.value).startswith(f"starling.star_adapter={str(adapter)!r} is refused: ")
    assert words in str(raised.value)
    assert "Allowed: " in str(raised.value)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("distil.json", "it has no distil.json that can be read"),
        ("adapter_config.json", "it has no adapter_config.json that can be read"),
        ("adapter_model.safetensors", "it has no adapter_model.safetensors that can be read"),
    ],
)
def test_a_folder_that_lacks_a_file(model, tmp_path, missing, words):
    adapter = make_adapter(tmp_path / "adapter", model)
    (adapter / missing).unlink()
    with pytest.raises(AdapterError, match=words):
        read_adapter(str(adapter))


@pytest.mark.parametrize("name", ["distil.json", "adapter_config.json"])
def test_a_description_is_read_up_to_a_bound(model, tmp_path, name):
    adapter = make_adapter(tmp_path / "adapter", model)
    (adapter / name).write_bytes(b" " * (2 << 20))
    with pytest.raises(AdapterError, match=f"{name} has more than 1048576 bytes"):
        read_adapter(str(adapter))


def test_weights_are_read_in_pieces_and_from_a_file_alone(model, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter", model)
    digest = read_adapter(str(adapter)).digest
    read_adapter.cache_clear()
    monkeypatch.setattr("starling.config.adapter.CHUNK_BYTES", 1000)
    assert read_adapter(str(adapter)).digest == digest
    read_adapter.cache_clear()
    weights = adapter / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # would be waited for
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors that can be read"):
        read_adapter(str(adapter))


def test_files_that_are_none(model, tmp_path):
    with pytest.raises(AdapterError, match="it is no folder"):
        read_adapter(str(tmp_path / "nothing"))
    adapter = make_adapter(tmp_path / "adapter", model)
    (adapter / "distil.json").write_text("{")
    with pytest.raises(AdapterError, match=r"distil\.json is not JSON"):
        read_adapter(str(adapter))
    (adapter / "distil.json").write_text(json.dumps([1]))
    with pytest.raises(AdapterError, match="Distilled"):
        read_adapter(str(adapter))


@pytest.mark.parametrize("value", ["", 3, ["a"]])
def test_a_value_that_is_no_path(model, value):
    with pytest.raises(OptionError, match=r"starling\.star_adapter=.* is refused: it must be a path"):
        EngineArgs(model=str(model), additional_config={"starling": {"star_adapter": value}}).create_engine_config()


def test_a_relative_path_is_that_of_the_start(model, tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter", model)
    monkeypatch.chdir(tmp_path)
    assert own_adapter(engine_config(model, Path("adapter"))).lora_path == str(tmp_path / "adapter")
