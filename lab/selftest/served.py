"""Checks of an engine as `starling serve --preset rag --star-adapter --star-library` starts it, on one GPU and on two.

Its adapter changes the model by zero. So with it, and from its library, documents have the tokens of an engine that has
neither.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

from starling.config.star import STAR_ADAPTER, STAR_LIBRARY
from starling.lab.selftest import check_prompts as p
from starling.lab.selftest.engine import EngineRun, Feature
from starling.lab.selftest.engine_checks import DOCUMENTS, Engines, judge_tokens
from starling.lab.selftest.model import adapter_refusal, vocabulary, zero_adapter
from starling.lab.selftest.result import Check, Result, Skip

ADAPTER, LIBRARY = "an adapter", "a library"
MEMORY = {True: "4GiB", False: "64MiB"}
"""Host memory of the library, by whether the model is the user's; the tiny one takes few MiB for all prompts."""


def adapter_feature(model: str, folder: Path) -> dict[str, Feature]:
    """Return an engine with an adapter of zeros, which is written to ``folder``; nothing for a model without one."""
    if adapter_refusal(model) is not None:
        return {}
    return {ADAPTER: Feature({STAR_ADAPTER: str(zero_adapter(folder, model))}, {})}


def served(engines: Engines, folder: Path, memory: str) -> EngineRun:
    """Return the activated engine of a setting, with an adapter and a library; it is not started yet.

    Args:
        engines: engines of a setting with documents.
        folder: gets the adapter.
        memory: size of the library's memory.
    """
    ours = engines.ours
    library = Feature({STAR_LIBRARY: f":{memory}"}, p.library_batches(vocabulary(engines.model)))
    features = {DOCUMENTS: ours.features[DOCUMENTS], LIBRARY: library} | adapter_feature(
        engines.model, folder / "adapter"
    )
    return EngineRun(ours.engine, {"star": ours.batches["star"]}, ours.env, features)


def served_checks(where: str, engines: Engines, run: EngineRun) -> list[Check]:
    """Return the checks of an engine that ``served`` made, or of one like it; ``where`` begins their names."""
    checks: dict[str, Callable[[Engines, EngineRun], Result | Skip]] = {
        "documents with an adapter": check_adapter,
        "documents from a library": check_library,
    }
    return [Check(f"{where}: {title}", functools.partial(check, engines, run)) for title, check in checks.items()]


def check_adapter(engines: Engines, run: EngineRun) -> Result | Skip:
    """Compare documents with an adapter of zeros, and without one. NaN where a prompt did not run with it."""
    refusal = adapter_refusal(engines.model) or refusal_of(engines, run, ADAPTER)
    if refusal:
        return Skip(refusal)
    batches = ("computed", "reordered", "reordered, cold")
    outputs, expected = (
        [output for batch in batches for output in engine.outputs(batch)] for engine in (run, engines.ours)
    )
    result = judge_tokens(outputs, expected, engines.noise())
    without = sum(not output["adapter"] for output in outputs)
    return Result(math.nan, 0, result.unit, f"{without} prompts ran without the adapter") if without else result


def check_library(engines: Engines, run: EngineRun) -> Result | Skip:
    """Compare documents from the library, and computed. NaN where not all were there."""
    refusal = refusal_of(engines, run, LIBRARY)
    if refusal:
        return Skip(refusal)
    (output,), length = run.outputs("stored"), sum(p.DOCUMENTS)
    stored = output["stored"]
    detail = f"{stored} of {length} tokens of documents from the library"
    result = judge_tokens([output], engines.ours.outputs("computed"), engines.noise(), detail)
    return result if stored == length else Result(math.nan, 0, result.unit, f"{detail}: all expected")


def refusal_of(engines: Engines, run: EngineRun, feature: str) -> str | None:
    """Return why an engine has no documents, or not the feature; None where it has both.

    Raises:
        EngineError: the engine to compare with failed. The other one is not started.
    """
    engines.ours.result()
    return engines.documents_refusal() or run.refusal(DOCUMENTS) or run.refusal(feature)
