"""Whether a running engine waits for the GPU, or compiles kernels: vLLM can make either an error."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from starling.selftest.engine_run import EngineError, EngineRun
from starling.selftest.result import Check, Result, Skip

SYNC_CHECK = {"VLLM_GPU_SYNC_CHECK": "error"}
JIT_MONITOR = {"jit_monitor_mode": "error"}


def steady(run: EngineRun) -> EngineRun:
    """An engine as ``run``, which fails if a step waits for the GPU or compiles a kernel.

    Its prompts have no log-probabilities, for which vLLM itself waits.
    """
    bare = {
        name: [prompt | {"bare": True, "prompt_logprobs": False} for prompt in batch]
        for name, batch in run.batches.items()
    }
    return EngineRun(run.engine | JIT_MONITOR, bare, run.env | SYNC_CHECK)


def steady_checks(name: str, plain: EngineRun, activated: Mapping[str, EngineRun], gpu: bool) -> list[Check]:
    """A check for each kind of activated engine, of the setting that ``name`` describes.

    Args:
        plain: an engine without Starling, with dense prompts.
        activated: what the prompts are -> an engine with such prompts.
    """
    strict = steady(plain)
    return [
        Check(
            f"{name}: no waiting and no compilation, {kind}",
            functools.partial(check_steady, strict, steady(run)) if gpu else functools.partial(Skip, NO_GPU),
        )
        for kind, run in activated.items()
    ]


NO_GPU = "no GPU: vLLM looks for both on a GPU only"


def check_steady(plain: EngineRun, activated: EngineRun) -> Result | Skip:
    """Run all batches of an engine that fails if a step waits or compiles (raises EngineError then).

    It is skipped where plain vLLM fails, or where the model can't have these prompts.
    """
    refusal = activated.refusal()
    if refusal is not None:
        return Skip(refusal)
    try:
        plain.result()
    except EngineError as error:
        return Skip(f"plain vLLM fails: {str(error).splitlines()[-1]}")
    tokens = sum(len(output["token_ids"]) for batch in activated.batches for output in activated.outputs(batch))
    return Result(tokens, None, "tokens", f"{len(activated.batches)} batches")
