"""Optional features of Starling, one folder each: star prompts, documents and dense heads run without them.

A folder has those of these files that it needs: ``core.py`` with ``PARTS``, the functions that make its hooks in the
engine core (scheduler/part.py); ``front.py`` and ``worker.py`` with ``make``, which makes its object in a front or in a
worker; and ``rules.py`` with what the feature does not run with. The front (engine_ext/front/) and the worker
(engine_ext/worker/) call these objects by name.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

FEATURES = ("replicas", "adapter", "fairness", "retention", "reuse", "library", "live")
"""Folders in the order in which their hooks are called.

``replicas`` comes before ``fairness``: a step that a split prompt has alone is not divided among long prompts.
``reuse`` comes after the features that note a step, since for model runner V2 it changes which requests are new.
"""


def parts_of_core() -> tuple[Any, ...]:
    """Return the functions that make the hooks of all features in the engine core, in their order."""
    names = (f"{__name__}.{feature}.core" for feature in FEATURES)
    return tuple(part for name in names if find_spec(name) is not None for part in import_module(name).PARTS)


def make_features(process: str, vllm_config: Any) -> dict[str, Any]:
    """Return the objects of the features in a process by the features' names, without those that have nothing to do.

    Args:
        process: "front" or "worker".

    Raises:
        OptionError: an option of the server can't be used.
    """
    made = {}
    for feature in FEATURES:
        name = f"{__name__}.{feature}.{process}"
        if find_spec(name) is not None and (found := import_module(name).make(vllm_config)) is not None:
            made[feature] = found
    return made
