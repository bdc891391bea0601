"""What is measured of CUDA graphs and of memory, with what vLLM gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from vllm.compilation.cuda_graph import CUDAGraphStat
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from starling.config.adapter import WEIGHTS
from starling.lab.selftest import model, selftest, served, speed
from starling.lab.selftest.engine import EngineRun
from starling.lab.selftest.engine_checks import settings
from starling.lab.selftest.result import Skip
from starling.vllm_compat.metrics import count_graphs, gpu_memory


def test_steps_are_counted_by_vllms_own_statistics():
    manager = object.__new__(StatLoggerManager)
    manager.stat_loggers = []
    counts = count_graphs(SimpleNamespace(logger_manager=manager))
    for mode in ("FULL", "PIECEWISE", "FULL"):
        manager.record(SchedulerStats(cudagraph_stats=CUDAGraphStat(1, 2, 1, mode)), None)
    manager.record(SchedulerStats(), None)
    manager.record(None, None)
    assert counts == {"FULL": 2, "PIECEWISE": 1}


def test_a_cpu_has_no_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory(SimpleNamespace()) is None


def memory(allocated: int, peak: int) -> dict[str, int]:
    """In GiB."""
    found = {"allocated": allocated, "peak": peak, "reserved": 60, "requested": 70, "profiled": 3}
    return {name: gib << 30 for name, gib in found.items()}


def engine(steps: dict[str, int], peak: int) -> EngineRun:
    """An engine that has run a batch of such steps on two ranks."""
    run = EngineRun({}, {"decode": []})
    run.__dict__["_result_or_error"] = {
        "environment": {"runner": "V1"},
        "batches": {
            "warm": {"graphs": {"NONE": 7}, "memory": 2 * [memory(50, 51)]},
            "decode": {"graphs": steps, "memory": [memory(50, 51), memory(50, peak)]},
        },
        "memory": 2 * [memory(50, 58)],
    }
    return run


def test_graphs_and_memory_of_an_activated_engine_are_shown_beside_those_of_plain_vllm():
    plain, ours = engine({"FULL": 31, "NONE": 1}, 52), engine({"PIECEWISE": 24, "FULL": 8}, 54)
    checks = speed.usage_checks(plain, ours, {"star": ["decode"], "documents": []}, gpu=True)
    graphs, taken = (check.run() for check in checks)
    assert (graphs.measured, graphs.unit) == (25, "%")
    assert graphs.detail == "32 steps: 24 PIECEWISE + 8 FULL; plain vLLM 96.9 %"
    assert (taken.measured, taken.unit) == (4, "GiB")
    assert "profile has 3 GiB for it, plain vLLM takes 2 GiB" in taken.detail
    assert "reserved 60 GiB in all, of 70 GiB" in taken.detail
    assert ours.environment() == {"runner": "V1", "steps by graphs": "24 PIECEWISE + 8 FULL + 7 NONE"}


def test_without_a_gpu_nothing_of_it_is_measured():
    checks = speed.usage_checks(engine({}, 0), engine({}, 0), {"star": ["decode"]}, gpu=False)
    assert [check.run() for check in checks] == [Skip(speed.NO_GRAPHS), Skip(speed.NO_PROFILE)]


@pytest.mark.parametrize(
    ("gib", "name"),
    [(79, "Llama-3.1-8B"), (60, "Llama-3.1-8B"), (44, "Llama-3.2-1B"), (15, "a small Llama"), (0, "a small Llama")],
)
def test_times_have_the_largest_model_that_fits(tmp_path, gib, name):
    """Without its weights, which vLLM makes: the engine's configuration is there."""
    found, sizes = model.timed_shape(gib << 30)
    assert found == name
    model.make_config(tmp_path, torch.bfloat16, sizes)
    arguments = EngineArgs(model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True)
    config = arguments.create_model_config()
    assert config.max_model_len == 1 << 18
    pages = 2 * config.get_num_kv_heads(SimpleNamespace(tensor_parallel_size=1)) * config.get_head_size() * 2
    kv_bytes = pages * config.hf_text_config.num_hidden_layers * speed.LENGTHS[True][-1]
    assert kv_bytes < (gib << 30) / 3 or not gib >= 20


def test_documents_in_another_order_are_the_same_documents():
    batches = speed.document_batches(320, [4096], gpu=False, max_length=8192, star=True)
    (first,), (second,) = batches["warm documents"], batches[speed.REORDERED]
    size, count = speed.DOCUMENT_TOKENS[False], speed.COUNT
    cut = [[one["ids"][start : start + size] for start in range(0, size * count, size)] for one in (first, second)]
    assert cut[0] == cut[1][::-1] and first["ids"][size * count :] == second["ids"][size * count :]
    assert first["star"] == second["star"]


def test_what_a_quick_run_measures(monkeypatch):
    """Tokens behind documents, by the number of requests; no long prompts."""
    for name in ("kernel_checks", "row_checks"):
        monkeypatch.setattr(selftest, name, list)
    names = {}
    for quick in (True, False):
        with selftest.make_suite(None, gpu=False, quick=quick) as (checks, _):
            names[quick] = {check.name for check in checks}
    assert {f"speed: a token behind {speed.COUNT} documents, {count} requests" for count in (1, 4)} <= names[True]
    assert {"speed: memory of the GPU", "speed: steps in full CUDA graphs, star"} <= names[True] & names[False]
    assert names[False] - names[True] == {
        f"{settings(gpu=False, quick=True)[0].name()}: no waiting and no compilation",
        "speed: first token of 4,096 tokens, star",
        "speed: a token behind 16 documents, 8 requests beside a decode of 4,096 tokens",
        "kernel: tile of a token behind documents",
        "kernel: tile of a question behind documents",
        "kernel: tile of a long tail behind documents",
        "speed: first token of a long tail behind documents",
        *(f"speed: a token behind 16 documents with an adapter, {count} requests" for count in (1, 4)),
    }


def test_each_model_of_a_run_has_an_adapter_of_its_own_shapes(monkeypatch):
    """Without a MODEL, times are measured with a larger one than the checks have."""
    for name in ("kernel_checks", "row_checks"):
        monkeypatch.setattr(selftest, name, list)
    with selftest.make_suite(None, gpu=False, quick=False) as (checks, _):
        runs = [check.run.args for check in checks if "documents with an adapter" in check.name]
        found = {}
        for run in (args[1] for args in runs if len(args) > 1):
            sizes = AutoConfig.from_pretrained(run.engine["model"])
            folder = run.features[served.ADAPTER].options["star_adapter"]
            matrix = load_file(f"{folder}/{WEIGHTS}")["base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"]
            assert matrix.shape == (sizes.intermediate_size, model.ADAPTER_RANK)
            found[run.engine["model"]] = folder
    assert len(found) == len(set(found.values())) == 2


def timed(run: EngineRun, **batches: dict) -> None:
    """Give an engine these outputs of batches of one prompt, as if it had run."""
    named = {name.replace("_", " "): {"outputs": [output]} for name, output in batches.items()}
    run.__dict__["_result_or_error"] = {"batches": named, "refused": {}}


def test_a_long_tail_is_timed_behind_documents_that_both_engines_have_cached():
    """A CPU's: 500 tokens behind 16 documents of 128. What the plain engine has cached stands where it stood."""
    plain, star = (speed.tail_batches(320, gpu=False, max_length=4096, star=star) for star in (False, True))
    (warm,), (tail,) = plain["warm a long tail"], plain[speed.TAIL]
    assert warm["ids"][:2048] == tail["ids"][:2048] and warm["ids"][2048:] != tail["ids"][2048:][: speed.QUERY]
    assert len(tail["ids"]) == 2548
    assert star[speed.TAIL] == [tail | {"star": {"star": "on", "star_segments": list(range(0, 2049, 128))}}]
    assert speed.tail_batches(320, gpu=False, max_length=2548, star=True) == {}
    engines = speed.Engines("a model", EngineRun({}, plain), EngineRun({}, star))
    timed(engines.plain, a_long_tail={"ttft": 0.12, "cached": 2032})
    timed(engines.ours, a_long_tail={"ttft": 0.3, "cached": 2048})
    result = speed.measure_tail(engines)
    assert (result.measured, result.unit) == (0.3, "s")
    assert result.detail == "500 tokens behind 2048 that are cached; plain vLLM, dense 0.12 s, 2032 cached"


def test_what_an_adapter_adds_to_a_token(monkeypatch):
    monkeypatch.setattr(speed, "adapter_refusal", lambda model: None)
    engines = speed.Engines("a model", EngineRun({}, {}), EngineRun({}, {}))
    adapted = EngineRun({}, {})
    timed(engines.ours, **{"1 requests": {"seconds_per_token": 0.010}})
    timed(adapted, **{"1 requests": {"seconds_per_token": 0.0125}})
    result = speed.measure_adapter(engines, adapted, "1 requests")
    assert (result.measured, result.unit, result.detail) == (12.5, "ms", "without it 10 ms: 2.5 ms more a token")


def test_memory_of_documents_beside_a_decode_is_that_of_its_batch():
    """25 documents and the decode fit one step, and the prompt that decodes has filled the step before."""
    (dense, documents), (_, plain) = (
        speed.wide_batches(320, gpu=True, max_length=1 << 17, star=star)[speed.WIDE] for star in (True, False)
    )
    assert len(dense["ids"]) == speed.STEP_TOKENS[True] > len(documents["ids"]) and "star" not in dense
    assert len(documents["star"]["star_segments"]) == 26 and documents == plain | {"star": documents["star"]}
    assert speed.wide_batches(320, gpu=False, max_length=1 << 17, star=True) == {}
    engines = speed.Engines("a model", engine({}, 53), engine({}, 54))
    for run, peak in ((engines.plain, 55), (engines.ours, 57)):
        run.result()["batches"][speed.WIDE] = {"graphs": {}, "memory": [memory(50, peak), memory(50, 51)]}
    result = speed.measure_wide_step(engines)
    assert (result.measured, result.unit) == (7, "GiB")
    assert result.detail == "vLLM's profile has 3 GiB for it, plain vLLM, dense takes 5 GiB"
