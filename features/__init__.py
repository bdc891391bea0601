"""The features of star, a folder each. Processes loop over their parts; few places ask for one by its class.

A folder has ``front.py`` with its parts where requests arrive (front_part.py), ``core.py`` with those in the engine
core (scheduler/part.py), ``worker.py`` with those in a worker (worker_part.py), and ``rules.py`` with what it does not
run with, as far as it needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

FEATURES = (
    "replicas",
    "documents",
    "dense_heads",
    "adapter",
    "fairness",
    "retention",
    "reuse",
    "library",
    "star",
    "live",
    "attamba",
)
"""The folders, in the order in which their parts are called. ``replicas`` comes before ``fairness``: a step that a
split prompt has alone is not divided among long prompts. ``reuse`` comes behind those that note a step, since for model
runner V2 it changes which requests are new, and ``star`` behind all others that bound a chunk."""


def parts_of(process: str) -> tuple[Any, ...]:
    """What makes the parts of all features in a process, in their order: ``PARTS`` of each module of that name.

    Args:
        process: "front", "core" or "worker".
    """
    names = (f"{__name__}.{feature}.{process}" for feature in FEATURES)
    return tuple(part for name in names if find_spec(name) is not None for part in import_module(name).PARTS)


def make_parts(process: str, vllm_config: Any) -> list[Any]:
    """The parts of all features in a front or in a worker, without those that have nothing to do there.

    Args:
        process: "front" or "worker".

    Raises:
        OptionError: an option of the server can't be used.
    """
    return [part for make in parts_of(process) if (part := make(vllm_config)) is not None]
