"""What is measured of CUDA graphs, of memory and of accuracy, with what vLLM and `starling eval` give."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from vllm.compilation.cuda_graph import CUDAGraphStat
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from starling.engine_ext.serving.cli import ended_with_parent
from starling.lab.evaluation.commands.eval import make_parser
from starling.lab.evaluation.tasks import TASKS
from starling.lab.selftest import accuracy, model, speed, suite
from starling.lab.selftest.engine_run import EngineRun
from starling.lab.selftest.result import Skip
from starling.vllm_compat.engine_readings import count_graphs, gpu_memory


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
        "batches": {"warm": {"graphs": {"NONE": 7}}, "decode": {"graphs": steps}},
        "memory": {"start": 2 * [memory(50, 58)], "end": [memory(50, 51), memory(50, peak)]},
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


RESULTS = {
    "cells": [
        {"task": task, "length": 4096, "prompts": number, "dense_score": 0.8, "score": 0.7, "attended_keys": 0.4}
        | {"difference": {"mean": -0.1, "low": -0.3, "high": 0.1}}
        for task, number in (("vt", 10), ("all", 10))
    ]
}


def test_accuracy_is_what_starling_eval_says_and_its_options_are_those_of_starling_eval(tmp_path, monkeypatch):
    called = []

    def run(command, **options):
        called.append(command)
        (tmp_path / "results.json").write_text(json.dumps(RESULTS))
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(accuracy, "format_of", lambda name: "text")
    check = accuracy.accuracy_check("a model", 8192, True, tmp_path, "TRITON_ATTN", None)
    result = check.run()
    assert round(result.measured, 6) == 10 and result.bound is None
    assert "dense 80.0, star 70.0 of 100, 95 % of the cost in [-10.0, 30.0]; 10 prompts" in result.detail
    assert "vt 80 to 70; 40 % of dense's attention work" in result.detail
    _, _, module, _, name, *arguments = called[0]
    assert (module, name) == (ended_with_parent.__name__, "eval")
    options, others = make_parser().parse_known_args(arguments)
    assert (options.serve, options.lengths, options.plans) == ("a model", ("7168",), [accuracy.PLAN])
    assert set(options.tasks) <= set(TASKS) and options.out == tmp_path
    assert others == ["--max-model-len", "8192", "--attention-backend", "TRITON_ATTN"]
    assert accuracy.accuracy_check("a model", 8192, False, tmp_path, None, None).run().measured == result.measured
    assert called[1][-1] == str(tmp_path) and "--enforce-eager" in called[1]


def test_accuracy_is_not_measured_without_a_model_a_tokenizer_or_room(tmp_path):
    def run(name, length):
        return accuracy.accuracy_check(name, length, False, tmp_path, None, None).run()

    assert run(None, 4096) == Skip(accuracy.NO_MODEL)
    assert run("a model", 1500) == Skip("the model takes 1,500 tokens at most")
    path = model.make_model(tmp_path / "tiny", torch.float32, model.TINY)
    assert run(str(path), 4096) == Skip(accuracy.NO_TOKENIZER)


def test_an_evaluation_that_fails_is_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "format_of", lambda name: "text")
    with pytest.raises(RuntimeError, match="starling eval ended with 2"):
        accuracy.measure_accuracy(str(tmp_path / "none"), 1024, 0, tmp_path, [])


def test_what_a_quick_run_measures(tmp_path, monkeypatch):
    """Tokens behind documents, by the number of requests; no long prompts, and no accuracy."""
    for name in ("kernel_checks", "row_checks"):
        monkeypatch.setattr(suite, name, list)
    names = {}
    for quick in (True, False):
        with suite.make_suite(None, gpu=False, quick=quick, results=tmp_path) as (checks, _):
            names[quick] = {check.name for check in checks}
    assert {f"speed: a token behind {speed.COUNT} documents, {count} requests" for count in (1, 4)} <= names[True]
    assert {"speed: memory of the GPU", "speed: steps in full CUDA graphs, star"} <= names[True] & names[False]
    assert names[False] - names[True] == {
        "V1, eager, KV as the model: no waiting and no compilation",
        "speed: first token of 4,096 tokens, star",
        "speed: a token behind 16 documents, 8 requests beside a decode of 4,096 tokens",
        "kernel: tile of a token behind documents",
        "kernel: tile of a question behind documents",
        "accuracy: points that star costs, n/8",
    }
