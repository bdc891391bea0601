"""Whether a running engine waits for the GPU, or compiles kernels: vLLM can make either an error."""

from __future__ import annotations

import functools
from dataclasses import replace

from starling.config.entry import ENTRY, GPU_ATTENTION
from starling.lab.selftest.engine_run import Batches, EngineError, EngineRun, Feature
from starling.lab.selftest.result import Check, Result, Skip

SYNC_CHECK = {"VLLM_GPU_SYNC_CHECK": "error"}
JIT_MONITOR = {"jit_monitor_mode": "error"}
NO_GPU = "no GPU: vLLM looks for both on a GPU only"
READS_LENGTHS = "xformers makes its masks on the host, from lengths that it reads from the GPU"


def bare(batches: Batches) -> Batches:
    """The same prompts without log-probabilities, for which vLLM itself waits."""
    return {
        name: [prompt | {"bare": True, "prompt_logprobs": False} for prompt in batch] for name, batch in batches.items()
    }


def steady(run: EngineRun) -> EngineRun:
    """An engine as ``run``, which fails if a step waits for the GPU or compiles a kernel."""
    features = {name: Feature(feature.options, bare(feature.batches)) for name, feature in run.features.items()}
    return EngineRun(run.engine | JIT_MONITOR, bare(run.batches), run.env | SYNC_CHECK, features)


def without_starling(run: EngineRun, plain: EngineRun) -> EngineRun:
    """A plain engine with the prompts of an activated one, dense: its steps are as wide."""
    batches = {
        name: [{field: value for field, value in prompt.items() if field != "star"} for prompt in batch]
        for name, batch in run.all_batches.items()
    }
    return replace(plain, batches=batches)


def steady_checks(name: str, plain: EngineRun, ours: EngineRun, gpu: bool) -> list[Check]:
    """The check of the setting that ``name`` describes.

    Args:
        plain: an engine without Starling.
        ours: an activated engine.
    """
    title = f"{name}: no waiting and no compilation"
    if not gpu:
        return [Check(title, functools.partial(Skip, NO_GPU))]
    if ours.engine["additional_config"][ENTRY].get(GPU_ATTENTION) == "xformers":
        return [Check(title, functools.partial(Skip, READS_LENGTHS))]
    return [Check(title, functools.partial(check_steady, steady(without_starling(ours, plain)), steady(ours)))]


def check_steady(plain: EngineRun, ours: EngineRun) -> Result | Skip:
    """Run all batches of an engine that fails if a step waits or compiles (raises EngineError then).

    It is skipped where plain vLLM fails with the same prompts, or where the model can't have star plans.
    """
    refusal = ours.refusal()
    if refusal is not None:
        return Skip(refusal)
    try:
        plain.result()
    except EngineError as error:
        return Skip(f"plain vLLM fails: {str(error).splitlines()[-1]}")
    batches = ours.result()["batches"]
    tokens = sum(len(output["token_ids"]) for batch in batches.values() for output in batch["outputs"])
    return Result(tokens, None, "tokens", f"{len(batches)} batches")
