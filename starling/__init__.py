"""Starling extends vLLM: ``from starling import LLM, StarOptions``. ``starling.client`` is a client that needs no vLLM.

The folders beside ``client/`` are links to those at the top of the repository (docs/architecture.md). The package
imports nothing of itself: LLM, which needs vLLM, and StarOptions are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.config.star import StarOptions
    from starling.engine_ext.front.llm import LLM

__all__ = ["LLM", "StarOptions"]

MODULES = {"LLM": "starling.engine_ext.front.llm", "StarOptions": "starling.config.star"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
