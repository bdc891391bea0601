"""What a feature does in the engine core: the hooks of a part, over which the scheduler loops (star_scheduler.py)."""

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
        """The part of a class; None: there is none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)


class CorePart:
    """One feature's part of one scheduler. The hooks do nothing here: a part has those that it needs.

    Parts are called in the order of features/__init__.py.
    """

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> Self | None:
        """The part of a scheduler, whose KV cache and connector are there; None: it has nothing to do here."""
        return cls()

    def arriving(self, request: Any) -> None:
        """A request arrives, and vLLM has not seen it yet."""

    def added(self, request: Any) -> None:
        """A request waits now. More input of a session is no new request."""

    def before_step(self) -> None:
        """A step is about to be scheduled."""

    def around_step(self) -> AbstractContextManager[Any] | None:
        """What a step is scheduled within; None: nothing. The first part that has something has the step."""
        return None

    def extend_hit(self, request: Any, pages: Sequence[Page], num_tokens: int) -> list[Page] | None:
        """Replace the pages found for a request's start; None leaves the hit as it is. The first part that has some.

        Args:
            pages: of the first KV cache group; ``num_tokens`` are those in them.
        """
        return None

    def kept_boundary(self, request: Any, num_tokens: int, found: int) -> int:
        """Where, besides at its end, the state or window of a prompt stays in the prefix cache: a page border.

        Args:
            num_tokens: those found in the prefix cache.
            found: what the parts before say, and at first where another prompt has turned out to differ, or 0.
        """
        return found

    def bound(self, request: Any, start: int, num_tokens: int) -> int:
        """How many of the tokens from position ``start`` on, as the parts before leave them, a request may have now."""
        return num_tokens

    def refuses(self, request: Any, start: int, num_tokens: int) -> bool:
        """Whether a chunk of this length, the final one, has to wait."""
        return False

    def scheduled(self, output: Any) -> None:
        """A step is about to go to the connector and to the workers; computed tokens are still those before it."""

    def before_outputs(self, output: Any) -> None:
        """What the workers computed in a step (vLLM's ModelRunnerOutput) is about to be read."""

    def outputs(self, outputs: dict[int, Any]) -> None:
        """The outputs of a step, by client, are about to go to the fronts."""

    def pages_freed(self, request: Any) -> None:
        """A request's pages are about to be freed: it has ended, or is preempted."""


HOOKS = tuple(name for name in vars(CorePart) if not name.startswith("_") and name != "make")


def hooks_of(parts: Iterable[CorePart]) -> dict[str, list[Callable[..., Any]]]:
    """For each hook, those of the parts that have it: a hook that no part has costs nothing."""
    known = list(parts)
    return {
        name: [getattr(part, name) for part in known if getattr(type(part), name) is not getattr(CorePart, name)]
        for name in HOOKS
    }
