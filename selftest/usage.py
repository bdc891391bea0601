"""What the steps of an engine use: CUDA graphs, and memory of the GPU beside the weights and the KV cache."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

from starling.selftest.engine_run import EngineRun, by_mode
from starling.selftest.result import Check, Result, Skip

NO_GRAPHS = "no GPU: a CPU has no CUDA graphs"
NO_PROFILE = "no GPU: vLLM makes no memory profile on a CPU"
FULL = "FULL"


def usage_checks(
    plain: EngineRun, engines: Mapping[str, EngineRun], batches: Mapping[str, Sequence[str]], gpu: bool
) -> list[Check]:
    """The measurements of engines that are activated, beside those of plain vLLM.

    Args:
        plain: an engine without Starling.
        engines: what their prompts are -> an engine.
        batches: some of these names -> batches of decodes, which the plain engine has too. An engine without batches
            has no check.
    """
    checks = []
    for kind, run in engines.items():
        if batches.get(kind):
            graphs = functools.partial(measure_graphs, run, plain, batches[kind])
            name = f"speed: steps in full CUDA graphs, {kind}"
            checks.append(Check(name, graphs if gpu else functools.partial(Skip, NO_GRAPHS)))
        if run.batches:
            memory = functools.partial(measure_memory, run, plain)
            name = f"speed: memory of the GPU, {kind}"
            checks.append(Check(name, memory if gpu else functools.partial(Skip, NO_PROFILE)))
    return checks


def measure_graphs(run: EngineRun, plain: EngineRun, batches: Sequence[str]) -> Result | Skip:
    """The share of an engine's steps that ran in full CUDA graphs, and of plain vLLM's with the same prompts."""
    refusal = run.refusal()
    if refusal is not None:
        return Skip(refusal)
    ours, plains = run.graphs(batches), plain.graphs(batches)
    detail = f"{ours.total()} steps: {by_mode(ours)}; plain vLLM {100 * full_share(plains):.3g} %"
    return Result(100 * full_share(ours), None, "%", detail)


def full_share(steps: Counter[str]) -> float:
    return steps[FULL] / max(steps.total(), 1)


def measure_memory(run: EngineRun, plain: EngineRun) -> Result | Skip:
    """GiB that the batches took at most beside what was allocated before them, on the rank that took most."""
    refusal = run.refusal()
    if refusal is not None:
        return Skip(refusal)
    ranks = run.result()["memory"]["end"]
    reserved, requested, profiled = (
        max(rank[name] for rank in ranks) / 2**30 for name in ("reserved", "requested", "profiled")
    )
    detail = (
        f"vLLM's profile has {profiled:.3g} GiB for it, plain vLLM takes {taken(plain):.3g} GiB; "
        f"torch has reserved {reserved:.3g} GiB in all, of {requested:.3g} GiB that vLLM may take"
    )
    return Result(taken(run), None, "GiB", detail)


def taken(run: EngineRun) -> float:
    memory = run.result()["memory"]
    ranks = zip(memory["start"], memory["end"], strict=True)
    return max(end["peak"] - start["allocated"] for start, end in ranks) / 2**30
