"""Hooks of a feature in the engine core: the methods of a part, over which star_scheduler.py loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, TypeVar

from starling.config.entry import StarlingConfig
from starling.vllm_compat.kv_pages import Page

P = TypeVar("P")


class HasParts:
    """Something that features have parts of."""

    parts: Sequence[Any]

    def part(self, kind: type[P]) -> P | None:
        """Return the part of a class, or None if there is none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)


class CorePart:
    """One feature's part of one scheduler. The hooks do nothing here: a part has those that it needs.

    Parts are called in the order of features/__init__.py.
    """

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> Self | None:
        """Return the part of a scheduler with KV cache and connector, or None if it has nothing to do here."""
        return cls()

    def arriving(self, request: Any) -> None:
        """Prepare a request that arrives, before vLLM has seen it."""

    def added(self, request: Any) -> None:
        """Take note of a request that waits now; more input of a session is no new request."""

    def before_step(self) -> None:
        """Prepare a step that is about to be scheduled."""

    def around_step(self) -> AbstractContextManager[Any] | None:
        """Return the context of a step, or None. The first part that has one has the step."""
        return None

    def extend_hit(self, request: Any, pages: Sequence[Page], num_tokens: int) -> list[Page] | None:
        """Replace the pages found for a request's start; None leaves the hit as it is. The first part that has some.

        Args:
            pages: of the first KV cache group; ``num_tokens`` are those in them.
        """
        return None

    def kept_boundary(self, request: Any, num_tokens: int, found: int) -> int:
        """Return the page border at which a prompt's state or window stays cached, besides at its end.

        Args:
            num_tokens: those found in the prefix cache.
            found: what the parts before say, and at first where another prompt has turned out to differ, or 0.
        """
        return found

    def bound(self, request: Any, start: int, num_tokens: int) -> int:
        """Cap the tokens of a request from position ``start`` on, as the parts before leave them, in this step."""
        return num_tokens

    def refuses(self, request: Any, start: int, num_tokens: int) -> bool:
        """Return whether a chunk of this length, the final one, has to wait."""
        return False

    def scheduled(self, output: Any) -> None:
        """Change a step before the connector and the workers get it; computed tokens are still those before it."""

    def before_outputs(self, output: Any) -> None:
        """Read what the workers computed in a step (vLLM's ModelRunnerOutput) before vLLM does."""

    def outputs(self, outputs: dict[int, Any]) -> None:
        """Change the outputs of a step, by client, before they go to the fronts."""

    def pages_freed(self, request: Any) -> None:
        """Take note that a request's pages are about to be freed: it has ended, or is preempted."""


HOOKS = tuple(name for name in vars(CorePart) if not name.startswith("_") and name != "make")


def hooks_of(parts: Iterable[CorePart]) -> dict[str, list[Callable[..., Any]]]:
    """For each hook, those of the parts that have it: a hook that no part has costs nothing."""
    known = list(parts)
    return {
        name: [getattr(part, name) for part in known if getattr(type(part), name) is not getattr(CorePart, name)]
        for name in HOOKS
    }
