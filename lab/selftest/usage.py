"""What the steps of an engine use: CUDA graphs, and memory of the GPU beside the weights and the KV cache."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

from starling.lab.selftest.engine_run import EngineRun, by_mode
from starling.lab.selftest.result import Check, Result, Skip

NO_GRAPHS = "no GPU: a CPU has no CUDA graphs"
NO_PROFILE = "no GPU: vLLM makes no memory profile on a CPU"
FULL = "FULL"


def usage_checks(plain: EngineRun, ours: EngineRun, batches: Mapping[str, Sequence[str]], gpu: bool) -> list[Check]:
    """The measurements of an activated engine, beside those of plain vLLM.

    Args:
        plain: an engine without Starling.
        batches: what prompts are -> batches of decodes, which both engines have. Kinds without batches have no check.
    """
    checks = []
    for kind, names in batches.items():
        if names:
            graphs = functools.partial(measure_graphs, ours, plain, kind, names)
            title = f"speed: steps in full CUDA graphs, {kind}"
            checks.append(Check(title, graphs if gpu else functools.partial(Skip, NO_GRAPHS)))
    memory = functools.partial(measure_memory, ours, plain)
    return [*checks, Check("speed: memory of the GPU", memory if gpu else functools.partial(Skip, NO_PROFILE))]


def measure_graphs(ours: EngineRun, plain: EngineRun, kind: str, batches: Sequence[str]) -> Result | Skip:
    """The share of an engine's steps that ran in full CUDA graphs, and of plain vLLM's with the same prompts."""
    refusal = ours.refusal(kind)
    if refusal is not None:
        return Skip(refusal)
    found, plains = ours.graphs(batches), plain.graphs(batches)
    detail = f"{found.total()} steps: {by_mode(found)}; plain vLLM {100 * full_share(plains):.3g} %"
    return Result(100 * full_share(found), None, "%", detail)


def full_share(steps: Counter[str]) -> float:
    return steps[FULL] / max(steps.total(), 1)


def measure_memory(ours: EngineRun, plain: EngineRun) -> Result | Skip:
    """GiB that the batches took at most beside what was allocated before them, on the rank that took most."""
    refusal = ours.refusal()
    if refusal is not None:
        return Skip(refusal)
    ranks = ours.result()["memory"]["end"]
    reserved, requested, profiled = (
        max(rank[name] for rank in ranks) / 2**30 for name in ("reserved", "requested", "profiled")
    )
    detail = (
        f"vLLM's profile has {profiled:.3g} GiB for it, plain vLLM takes {taken(plain):.3g} GiB; "
        f"torch has reserved {reserved:.3g} GiB in all, of {requested:.3g} GiB that vLLM may take"
    )
    return Result(taken(ours), None, "GiB", detail)


def taken(run: EngineRun) -> float:
    memory = run.result()["memory"]
    ranks = zip(memory["start"], memory["end"], strict=True)
    return max(end["peak"] - start["allocated"] for start, end in ranks) / 2**30
