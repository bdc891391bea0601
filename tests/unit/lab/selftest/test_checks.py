"""The checks fail for wrong implementations, and what they compare is what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm import envs
from vllm.engine.arg_utils import EngineArgs

from starling.attention_backends.kernels.cpu import fallback
from starling.config.adapter import WEIGHTS, read_adapter
from starling.features.replicas import network
from starling.lab.selftest import check_prompts as p
from starling.lab.selftest import engine, engine_checks, kernels, model, moved_pages, selftest, served, speed
from starling.lab.selftest.engine import EngineError, EngineRun
from starling.lab.selftest.engine_checks import Setting, judge_tokens, settings
from starling.lab.selftest.kernels import DECODE, MIXED, make_operands
from starling.lab.selftest.result import Check, Skip, Verdict, judge


def wrong_page(operands):
    """The first page of each row in the place of the second."""
    table = operands.block_table.clone()
    table[:, 1] = table[:, 0]
    return fallback.paged_attention(replace(operands, block_table=table))


def wrong_lse(operands):
    out, lse = fallback.paged_attention(operands)
    return out, lse + 1e-3


def not_causal(operands):
    return fallback.paged_attention(replace(operands, causal=False))


def int32_offsets(operands):
    """Page ids whose offsets wrap at 2^31 elements, as an int32 would."""
    pages = (1 << 31) // operands.keys[0].numel()
    return fallback.paged_attention(replace(operands, block_table=operands.block_table % pages))


@pytest.mark.parametrize(
    ("attention", "passes"),
    [(fallback.paged_attention, True), (wrong_page, False), (wrong_lse, False), (not_causal, False)],
)
def test_a_wrong_kernel_fails(attention, passes):
    cases = [make_operands(lens, torch.float32) for lens in (MIXED, DECODE)]
    outcome = judge(Check("kernel", lambda: kernels.judge_cases(attention, cases, "cpu")))
    assert outcome.verdict is (Verdict.PASS if passes else Verdict.FAIL)


@pytest.mark.parametrize(("attention", "passes"), [(fallback.paged_attention, True), (int32_offsets, False)])
def test_a_kernel_with_32_bit_offsets_fails_on_the_large_cache(attention, passes):
    large = kernels.in_large_cache(attention)
    result = kernels.judge_cases(large, [kernels.large_case()], "cpu")
    assert (result.measured <= result.bound) == passes


@pytest.mark.parametrize(
    "change", [{"anchor_size": 32}, {"overlap_size": 0}, {"block_size": 128}, {"context_end": 500}]
)
@pytest.mark.parametrize("own_op", [False, True])
def test_rows_of_another_plan_fail(own_op, change):
    right, wrong = kernels.check_rows(own_op), kernels.check_rows(own_op, replace(kernels.PLAN, **change))
    assert right.measured <= right.bound < wrong.measured


def output(tokens: str, margin: float = 1.0, **fields) -> dict:
    return {"token_ids": list(tokens), "margins": [margin] * len(tokens)} | fields


@pytest.mark.parametrize(
    ("tokens", "margin", "different"), [("abc", 1.0, 0), ("abd", 1.0, 1), ("abd", 0.01, 0), ("xyz", math.nan, 1)]
)
def test_tokens_may_differ_only_where_two_are_equally_probable(tokens, margin, different):
    assert judge_tokens([output(tokens)], [output("abc", margin)], noise=0.1).measured == different


def fake_engines(**batches: dict) -> SimpleNamespace:
    """Engines whose batches have these outputs; ``preemptions`` is a field of the output."""
    named = {name.replace("_", " "): out for name, out in batches.items()}
    result = {"batches": {name: {"outputs": [out], "preemptions": out["preemptions"]} for name, out in named.items()}}
    run = SimpleNamespace(outputs=lambda name: [named[name]], result=lambda: result)
    return SimpleNamespace(ours=run, plain=run, noise=lambda: 0.1)


@pytest.mark.parametrize(("calm", "preempted", "fine"), [(0, 2, True), (0, 0, False), (1, 2, False)])
def test_a_preemption_check_without_a_preemption_fails(calm, preempted, fine):
    first, second = output("ab", preemptions=calm), output("cd", preemptions=0)
    engines = fake_engines(calm_1=first, calm_2=second, preempted=output("ab", preemptions=preempted))
    engines.ours.outputs = lambda name: {"calm 1": [first], "calm 2": []}.get(name, [output("ab")])
    assert (engine_checks.check_preemption(engines).measured == 0) == fine


@pytest.mark.parametrize(("warm", "cold", "fine"), [(576, 0, True), (320, 0, False), (0, 0, False), (576, 576, False)])
def test_a_cache_check_without_cached_tokens_fails(warm, cold, fine):
    fields = {"preemptions": 0}
    engines = fake_engines(warm=output("ab", cached=warm, **fields), alone=output("ab", cached=cold, **fields))
    assert (engine_checks.check_cached(engines, "warm", "alone").measured == 0) == fine


def test_the_prompts_of_preemption_exceed_the_cache_and_half_of_them_fit():
    batches = p.star_batches(model.VOCABULARY, num_decodes=63)
    pages = {
        name: sum(-(-(len(one["ids"]) + one["max_tokens"]) // p.PAGE_SIZE) for one in batch)
        for name, batch in batches.items()
    }
    assert pages.pop("preempted") > p.NUM_PAGES
    assert max(pages.values()) < p.NUM_PAGES, "one page is vLLM's null page"
    assert all(0 <= token < model.VOCABULARY for batch in batches.values() for one in batch for token in one["ids"])


def test_an_engine_that_crashes_fails_its_checks_and_is_started_once(monkeypatch):
    starts = []

    def crash(job, env):
        starts.append(job)
        raise EngineError("the engine's process ended with -11:\nSegmentation fault")

    monkeypatch.setattr(engine, "run_engine", crash)
    run = EngineRun({}, {})
    for _ in range(2):
        assert "Segmentation fault" in judge(Check("engine", run.result)).detail
    assert len(starts) == 1
    assert run.environment() == {"failed": "the engine's process ended with -11:"}


def test_options_that_the_model_excludes_are_named_and_a_crash_is_not(monkeypatch):
    reason = "starling.star_heads='a' is refused: a reason"
    message = f"the engine's process ended with 1:\nTraceback\nstarling.parsing.OptionError: {reason}"

    def end(job, env):
        raise EngineError(job["engine"]["message"])

    monkeypatch.setattr(engine, "run_engine", end)
    assert EngineRun({"message": message}, {}).refusal() == reason
    assert EngineRun({"message": "the engine's process ended with -11:"}, {}).refusal() is None


def test_an_engine_is_made_without_a_feature_that_is_refused(monkeypatch):
    """It is started again without it, and its other checks run."""
    jobs = []

    def run(job, env):
        jobs.append(job)
        if "star_heads" in job["engine"]["additional_config"]["starling"]:
            raise EngineError("the engine ended with 1:\nOptionError: starling.star_heads='a' is refused: a reason")
        return {"batches": {name: {"outputs": []} for name in job["batches"]}}

    monkeypatch.setattr(engine, "run_engine", run)
    features = {
        "dense heads": engine.Feature({"star_heads": "a"}, {"heads": []}),
        "documents": engine.Feature({"star_segments": "auto"}, {"documents": []}),
    }
    made = EngineRun({"additional_config": {"starling": {"star": "on"}}}, {"star": []}, features=features)
    assert made.refusal() is None and made.refusal("documents") is None
    assert made.refusal("dense heads") == "starling.star_heads='a' is refused: a reason"
    assert made.outputs("star") == made.outputs("documents") == []
    assert [sorted(job["batches"]) for job in jobs] == [["documents", "heads", "star"], ["documents", "star"]]
    assert jobs[1]["engine"]["additional_config"] == {"starling": {"star": "on", "star_segments": "auto"}}
    assert sorted(made.all_batches) == ["documents", "heads", "star"]


@pytest.mark.parametrize("unit", [0.01, 0.125])
def test_ties_are_as_wide_as_plain_vllms_own_differences(monkeypatch, unit):
    """Without a reference: one unit of bfloat16 is 0.125 where logits are 16 or more."""
    monkeypatch.setattr(engine_checks, "reference_refusal", lambda model: "too large")
    alone = {"prompt_logprobs": [0.0, unit], "logprobs": [0.0, unit]}
    beside = {"prompt_logprobs": [unit, 0.0], "logprobs": [0.0, unit]}
    outputs = {"dense": [alone], "dense, beside": [{}, beside]}
    plain = SimpleNamespace(outputs=outputs.__getitem__)
    engines = engine_checks.Engines("a model", plain, plain)
    assert engines.noise() == pytest.approx(engine_checks.NOISE * unit / 2**0.5)


def test_the_message_of_a_crash_is_what_the_process_printed():
    with pytest.raises(EngineError, match="KeyError: 'engine'"):
        engine.run_engine({"batches": {}}, {})


def test_the_longest_prompt_has_room_for_the_padding_of_documents():
    padded = sum(-(-length // p.PAGE_SIZE) * p.PAGE_SIZE for length in p.DOCUMENTS)
    assert padded + p.QUERY + p.NEW <= p.LONGEST <= p.MAX_LENGTH


@pytest.mark.parametrize(("vllm", "runners"), [("0.32.0+cpu", 2), ("0.34.0", 1)])
def test_settings(monkeypatch, vllm, runners):
    monkeypatch.setattr(engine_checks, "vllm_version", lambda: vllm)
    v1 = "V1" if runners == 2 else None
    assert settings(gpu=False, quick=False) == settings(gpu=False, quick=True) == [Setting(v1, True)]
    assert len(settings(gpu=True, quick=True)) == 1
    every = [(one.runner, one.eager, one.kv_dtype) for one in settings(gpu=True, quick=False)]
    for first, second in combinations(range(3), 2):
        pairs = {(setting[first], setting[second]) for setting in every}
        assert len(pairs) == (2 * runners if first == 0 else 4), "each two values meet"


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_what_needs_two_gpus_is_skipped_with_the_reason(monkeypatch, gpus):
    missing = Skip(f"{gpus} GPUs, and two are needed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(selftest, "judge_pages", lambda *devices: devices)
    monkeypatch.setattr(selftest, "find_spec", {"nixl": None}.get)
    assert selftest.check_moved_pages() == (missing if gpus < 2 else Skip("NIXL is not installed"))
    monkeypatch.setattr(selftest, "find_spec", {"nixl": "a module"}.get)
    assert selftest.check_moved_pages() == (("cuda:0", "cuda:1") if gpus == 2 else missing)
    assert selftest.two_gpus_missing() == (None if gpus == 2 else missing)


def test_pages_that_two_processes_move_are_those_of_the_source():
    """In the memory of a CPU, where a GPU's check has that of two GPUs."""
    result = selftest.judge_pages("cpu", "cpu")
    assert (result.measured, result.bound) == (0, 0)
    assert "0.0625 GiB of scattered pages" in result.detail and "GB/s" in result.detail


def test_a_page_that_is_another_one_is_counted(monkeypatch):
    """A source whose pages have other contents than those that are expected of it."""
    monkeypatch.setenv(network.DEVICES_ENV, network.devices(True, {}))
    source = moved_pages.make_caches("cpu", 2)
    held = moved_pages.make_reader("source", source)
    assert moved_pages.read_pages(held.address(), "cpu")["different"] == 32 * 32
    held.close()


def test_a_process_that_can_not_read_pages_fails_the_check():
    with pytest.raises(RuntimeError, match="ended with 1:"):
        selftest.judge_pages("cpu", "no device")


def gpu_engines(tmp_path) -> engine_checks.Engines:
    """The engines of a setting on a GPU, of which none has started."""
    path = str(model.make_model(tmp_path / "model", torch.bfloat16, model.TINY))
    setting = Setting(None, eager=False)
    return engine_checks.make_engines(path, model.VOCABULARY, 4096, setting, True, tmp_path, starling={})


def finished(run: EngineRun, **fields) -> EngineRun:
    """An engine as ``run``, each of whose prompts had the same output; ``fields`` are those of an output."""
    outputs = {name: {"outputs": [output("ab", **fields) for _ in batch]} for name, batch in run.all_batches.items()}
    made = replace(run)
    made.__dict__["_result_or_error"] = {"batches": outputs, "refused": {}}
    return made


def test_two_gpus_serve_documents_with_an_adapter_and_a_library(tmp_path, monkeypatch):
    """As `serve --preset rag -tp 2 --star-adapter --star-library`: one engine, which the checks share."""
    engines, jobs = gpu_engines(tmp_path), []
    engines.plain.__dict__["_result_or_error"] = engines.ours.__dict__["_result_or_error"] = {"batches": {}}

    def end(job, env):
        jobs.append(job)
        raise EngineError("the engine's process ended with 1:")

    monkeypatch.setattr(engine, "run_engine", end)
    monkeypatch.setattr(selftest, "two_gpus_missing", lambda: None)
    monkeypatch.setattr(selftest, "check_moved_pages", lambda: Skip("not here"))
    checks = selftest.two_gpu_checks(engines, served.served(engines, tmp_path, "64MiB"))
    assert [judge(check).verdict for check in checks] == 3 * [Verdict.FAIL] + [Verdict.SKIP]
    (job,) = jobs
    options = job["engine"]["additional_config"]["starling"]
    assert job["engine"]["tensor_parallel_size"] == 2 and "star_heads" not in options
    assert (options["star_segments"], options["star_library"]) == ("auto", ":64MiB")
    assert "star_segments" in job["batches"]["computed"][0]["star"] and {"star", "stored"} <= set(job["batches"])
    adapter = read_adapter(options["star_adapter"])
    assert (adapter.purposes, adapter.rank, len(adapter.target_modules)) == (("documents",), 8, 7)
    weights = load_file(f"{adapter.folder}/{WEIGHTS}")
    changes = [weights[name] for name in weights if "lora_B" in name]
    assert len(changes) == 7 * model.TINY["num_hidden_layers"] and not any(change.any() for change in changes)
    assert EngineArgs(**job["engine"]).tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({"adapter": True}, True),
        ({"adapter": False}, False),
        ({"adapter": True, "token_ids": list("ac")}, False),
    ],
    ids=["equal", "without the adapter", "other tokens"],
)
def test_an_adapter_of_zeros_that_was_not_used_or_changes_a_token_fails_the_check(tmp_path, monkeypatch, fields, fine):
    monkeypatch.setattr(engine_checks.Engines, "own_gap", 0.0)
    engines = gpu_engines(tmp_path)
    run = finished(served.served(engines, tmp_path, "64MiB"), **fields)
    engines = replace(engines, ours=finished(engines.ours))
    assert (served.check_adapter(engines, run).measured == 0) == fine
    tokens_differ = "token_ids" in fields
    assert (selftest.check_tensor_parallel(engines, run).measured > 0) == tokens_differ


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({"stored": sum(p.DOCUMENTS)}, True),
        ({"stored": sum(p.DOCUMENTS) - 1}, False),
        ({"stored": sum(p.DOCUMENTS), "token_ids": list("ac")}, False),
    ],
    ids=["equal", "computed in part", "other tokens"],
)
def test_documents_that_are_not_in_the_library_or_not_the_same_there_fail_the_check(
    tmp_path, monkeypatch, fields, fine
):
    monkeypatch.setattr(engine_checks.Engines, "own_gap", 0.0)
    engines = gpu_engines(tmp_path)
    run = finished(served.served(engines, tmp_path, "64MiB"), **fields)
    engines = replace(engines, ours=finished(engines.ours))
    assert (served.check_library(engines, run).measured == 0) == fine


def test_what_is_refused_of_an_engine_as_served_is_skipped(tmp_path):
    engines = gpu_engines(tmp_path)
    run = finished(served.served(engines, tmp_path, "64MiB"))
    engines = replace(engines, ours=finished(engines.ours))
    run.__dict__["_result_or_error"]["refused"] = {served.ADAPTER: "no LoRA", served.LIBRARY: "no room"}
    assert served.check_adapter(engines, run) == Skip("no LoRA")
    assert served.check_library(engines, run) == Skip("no room")


def test_a_model_of_other_layers_has_no_adapter_of_zeros(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    assert served.adapter_feature(str(tmp_path), tmp_path) == {}
    assert "llama, mistral, qwen2, qwen3, and this is gemma2" in str(model.adapter_refusal(str(tmp_path)))


def test_prompts_before_the_library_is_asked_take_every_page():
    others = p.library_batches(model.VOCABULARY)["other prompts"]
    full = [len(one["ids"]) // p.PAGE_SIZE for one in others]
    assert sum(full) >= p.NUM_PAGES > max(full)


def engines_asked_for(monkeypatch, path: str) -> tuple[list[dict], dict[str, str]]:
    """The arguments of each engine that a GPU's checks start for a model, and why checks are skipped, by their names.

    Each engine ends at once, as one that crashes.
    """
    asked = []

    def end(job, env):
        asked.append(job)
        raise EngineError("the engine's process ended with 1:")

    monkeypatch.setattr(engine, "run_engine", end)
    monkeypatch.setattr(selftest, "kernel_checks", list)
    monkeypatch.setattr(selftest, "row_checks", list)
    with selftest.make_suite(path, gpu=True, quick=False) as (checks, _):
        outcomes = [judge(check) for check in checks]
    return asked, {one.name: one.detail for one in outcomes if one.verdict is Verdict.SKIP}


@pytest.mark.parametrize("longest", [500, 700, 4096, 40960, 131072])
def test_no_engine_is_asked_for_more_tokens_than_vllm_takes_for_the_model(tmp_path, monkeypatch, longest):
    """vLLM itself says so, where it reads the engine's arguments. And each prompt with its output fits."""
    sizes = model.TINY | {"max_position_embeddings": longest}
    path = model.make_model(tmp_path / "model", torch.bfloat16, sizes)
    asked, skipped = engines_asked_for(monkeypatch, str(path))
    settings, steady, timed = (2 * number for number in (4, 1, 1))  # plain and activated
    timed -= 1  # plain vLLM's times are not asked for where the activated engine has ended
    assert len(asked) == (settings + steady + timed if longest > 500 else 0)
    for job in asked:
        taken = EngineArgs(skip_tokenizer_init=True, **job["engine"]).create_model_config().max_model_len
        prompts = [one for batch in job["batches"].values() for one in batch]
        assert prompts
        assert all(len(one["ids"]) + one["max_tokens"] <= taken <= longest for one in prompts)
    reasons = [reason for reason in skipped.values() if f"the model takes {longest:,} tokens at most" in reason]
    assert len(reasons) == {500: 9, 700: 4, 4096: 3}.get(longest, 0), skipped


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [
        (1 << 18, {32768: 32768, 131072: 131072}),
        (131073, {32768: 32768, 131072: 131072}),
        (131072, {32768: 32768, 131072: 130048}),
        (40960, {32768: 32768, 131072: 39936}),
        (32768, {32768: 31744, 131072: None}),
        (2049, {32768: 2048, 131072: None}),
        (2048, {32768: None, 131072: None}),
    ],
)
def test_prompts_whose_times_are_measured_are_shortened_to_what_the_model_takes(longest, lengths):
    assert speed.lengths_within(speed.LENGTHS[True], longest) == lengths


def test_a_shortened_prompt_says_so_and_one_that_is_left_out_says_why():
    timed = SimpleNamespace(outputs=lambda name: [{"ttft": 1.0}], refusal=lambda feature: "no dense heads")
    timed = speed.Engines("a model", timed, timed)
    assert speed.prefill_check(timed, 4096, 4096, "a limit").run().detail.endswith("block of n/8")
    shorter = speed.prefill_check(timed, 4096, 3072, "the model takes 4,096 tokens at most")
    assert shorter.name == "speed: first token of 3,072 tokens, star"
    assert shorter.run().detail.endswith("; not 4,096 tokens, as the model takes 4,096 tokens at most")
    left_out = speed.prefill_check(timed, 4096, None, "the model takes 700 tokens at most")
    assert left_out.name == "speed: first token of 4,096 tokens, star"
    assert left_out.run() == Skip("the model takes 700 tokens at most, and no other prompt of 2,048 or more fits")


class Engine:
    """An engine that ends as it is told: with a number of tokens, with an error, or with a refusal."""

    def __init__(self, tokens: int = 3, error: str = "", refused: str | None = None) -> None:
        self.tokens, self.error, self.refused = tokens, error, refused

    def result(self) -> dict:
        if self.error:
            raise EngineError(f"the engine's process ended with 1:\n{self.error}")
        return {"batches": {name: {"outputs": [{"token_ids": [0] * self.tokens}]} for name in ("one", "two")}}

    def refusal(self) -> str | None:
        return self.refused


def test_a_step_that_waits_or_compiles_fails_the_check_unless_plain_vllm_does_too():
    assert engine_checks.check_steady(Engine(), Engine()).measured == 6
    with pytest.raises(EngineError, match="synchronizing"):
        engine_checks.check_steady(Engine(), Engine(error="a synchronizing call"))
    assert engine_checks.check_steady(Engine(error="a call"), Engine(error="a call")) == Skip(
        "plain vLLM fails: a call"
    )
    assert engine_checks.check_steady(Engine(), Engine(refused="no star")) == Skip("no star")


def test_engines_that_may_not_wait_are_told_so_and_ask_for_no_logprobs(tmp_path):
    """vLLM takes both settings: the one as an argument of an engine, the other as a variable."""
    run = engine.EngineRun({"model": str(tmp_path)}, {"one": [{"ids": [1], "prompt_logprobs": True}]}, {"A": "1"})
    strict = engine_checks.steady(run)
    assert EngineArgs(**strict.engine).jit_monitor_mode == "error"
    assert (
        strict.env == {"A": "1", "VLLM_GPU_SYNC_CHECK": "error"} and "VLLM_GPU_SYNC_CHECK" in envs.environment_variables
    )
    assert strict.batches == {"one": [{"ids": [1], "prompt_logprobs": False, "bare": True}]}


def activated(**options) -> EngineRun:
    features = {"documents": engine.Feature({"star_segments": "auto"}, {"documents": [{"ids": [2], "star": {}}]})}
    arguments = {"additional_config": {"starling": options}}
    return EngineRun(arguments, {"star": 3 * [{"ids": [1], "star": {"star": "on"}}]}, features=features)


def test_a_plain_engine_that_may_not_wait_has_steps_of_the_same_width():
    dense = engine_checks.without_starling(activated(), EngineRun({"model": "a"}, {"off": []}))
    assert dense.engine == {"model": "a"}
    assert dense.batches == {"star": 3 * [{"ids": [1]}], "documents": [{"ids": [2]}]}


@pytest.mark.parametrize(
    ("gpu", "attention", "why"),
    [(False, "vllm", engine_checks.NOT_LOOKED_FOR), (True, "xformers", engine_checks.READS_LENGTHS)],
)
def test_nothing_is_looked_for_without_a_gpu_or_where_kernels_need_the_host(gpu, attention, why):
    (check,) = engine_checks.steady_checks("a setting", EngineRun({}, {}), activated(gpu_attention=attention), gpu)
    assert check.run() == Skip(why) and check.name == "a setting: no waiting and no compilation"
