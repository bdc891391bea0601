"""KV memory of replicas for prompts that leave their pages where they were made, counted in pages."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.options import OptionError, flat_name
from scheduler.plan import StarPlan
from scheduler.spread import Run


@dataclass(frozen=True)
class KVRoom:
    """What one prompt takes of each replica.

    Attributes:
        page: tokens of a page.
        pages: replica -> its pages.
    """

    plan: StarPlan
    page: int
    pages: Mapping[int, int]

    def blocks(self, replica: int) -> int:
        """Star blocks that a replica can hold beside the anchor's copy, or the query and a token of output."""
        beside = max(self.plan.anchor_size // self.page, self._tail(1))
        return max((self.pages[replica] - beside) * self.page // self.plan.block_size, 0)

    def of_runs(self, runs: Sequence[Run], params: Any) -> dict[int, int]:
        """Pages that a prompt split like this takes on each replica, at most all that there are.

        The first one's replica also holds the query, and the output of each choice.
        """
        wanted = {}
        for number, run in enumerate(runs):
            start, stop = run.first * self.plan.block_size, min(run.stop * self.plan.block_size, self.plan.context_end)
            beside = self.plan.anchor_size // self.page if number else params.n * self._tail(params.max_tokens)
            wanted[run.replica] = min(-(-(stop - start) // self.page) + beside, self.pages[run.replica])
        return wanted

    def _tail(self, output_tokens: int | None) -> int:
        """Pages of the query and the output; all there could be where nobody says how long that is."""
        if output_tokens is None:
            return max(self.pages.values())
        return -(-(self.plan.num_prompt_tokens - self.plan.context_end + output_tokens) // self.page) + 1


def enough_replicas(plan: StarPlan, page: int, pages: int, most: int) -> StarPlan:
    """The plan with as many replicas as its KV needs, each of so many pages.

    Raises:
        OptionError: ``most`` of them are not enough.
    """
    room = KVRoom(plan, page, {0: pages}).blocks(0)
    needed = -(-plan.num_star_blocks // room) if room else most + 1
    if needed > most:
        reason = (
            f"{plan.num_star_blocks} star blocks of {plan.block_size} tokens, anchor and query need more KV memory "
            f"than {most} replicas of {pages} pages of {page} tokens have"
        )
        raise OptionError(flat_name("shards"), "on", reason, "a shorter prompt, smaller blocks, or more memory")
    return replace(plan, replicas=max(plan.replicas, needed))


class Rooms:
    """Which pages prompts have been promised. Each takes all it needs at once, and first comes first served: so no two
    of them wait for what the other one holds."""

    def __init__(self) -> None:
        self.taken: Counter[int] = Counter()
        self.changed = asyncio.Event()
        self.turn = asyncio.Lock()

    async def take(self, wanted: Mapping[int, int], pages: Mapping[int, int]) -> None:
        """Wait until each replica has so many pages that are promised to nobody."""
        async with self.turn:
            while any(self.taken[replica] + count > pages[replica] for replica, count in wanted.items()):
                self.changed.clear()
                await self.changed.wait()
            self.taken.update(wanted)

    def give(self, taken: Mapping[int, int]) -> None:
        self.taken.subtract(taken)
        self.changed.set()


def rooms(engine: Any) -> Rooms:
    """Those of an engine's replicas; kept on it."""
    if not hasattr(engine, "starling_rooms"):
        engine.starling_rooms = Rooms()
    found: Rooms = engine.starling_rooms
    return found
