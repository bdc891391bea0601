"""KV memory of replicas for prompts that leave their pages where they were made, counted in pages."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine_ext.per_engine import per_engine
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

        The first one's replica also holds the query, and the output of each choice. Where it fetches the others' pages
        it holds these too, and what it generates then holds up nobody.
        """
        size, end, wanted = self.plan.block_size, self.plan.context_end, {}
        for number, run in enumerate(runs):
            here = min(run.stop * size, end) - run.first * size
            if number:
                beside = self.plan.anchor_size // self.page
            elif self.plan.shards:
                beside = params.n * self._tail(params.max_tokens)
            else:
                here, beside = end, self._tail(0)
            wanted[run.replica] = min(-(-here // self.page) + beside, self.pages[run.replica])
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
    """Which pages prompts over several replicas have been promised, while they hold some and wait for others.

    With shards they do so to their end, and two could wait for what the other one holds. So each takes all it needs at
    once, and first comes first served. Those that fetch pages let go soon: among themselves they are not held up.
    """

    def __init__(self) -> None:
        self.taken: Counter[int] = Counter()
        self.shards = 0
        self.changed = asyncio.Event()
        self.turn = asyncio.Lock()

    async def take(self, wanted: Mapping[int, int], pages: Mapping[int, int], shards: bool) -> Promise:
        """Wait until each replica has so many pages that are promised to nobody."""
        async with self.turn:
            while (shards or self.shards) and any(self.taken[at] + count > pages[at] for at, count in wanted.items()):
                self.changed.clear()
                await self.changed.wait()
            self.taken.update(wanted)
            self.shards += shards
        return Promise(self, wanted, shards)


@dataclass
class Promise:
    """Pages that a prompt may use, by replica."""

    rooms: Rooms
    pages: Mapping[int, int]
    shards: bool

    def give_back(self) -> None:
        """They are free again; a second time does nothing."""
        self.rooms.taken.subtract(self.pages)
        self.rooms.shards -= self.shards
        self.pages, self.shards = {}, False
        self.rooms.changed.set()


rooms = per_engine("rooms", Rooms)
