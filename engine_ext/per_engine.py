"""What Starling keeps of one vLLM engine at the front, on the engine itself: made at its first use, gone with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def per_engine(name: str, make: Callable[[], T]) -> Callable[[Any], T]:
    """A function from an engine to its own one of what ``make`` makes."""
    attribute = f"starling_{name}"

    def of(engine: Any) -> T:
        if not hasattr(engine, attribute):
            setattr(engine, attribute, make())
        kept: T = getattr(engine, attribute)
        return kept

    return of
