"""KV pages that a prompt takes on the replicas that it is split over. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starling.config.parsing import OptionError
from starling.config.star import flat_name
from starling.scheduler.star.assignment import Assignment, replicas_needed
from starling.scheduler.star.plan import StarPlan, block_range, work


@dataclass(frozen=True)
class KVDemand:
    """The pages that one prompt takes on each replica.

    Attributes:
        page_size: tokens of a page.
        capacity: replica -> its pages.
    """

    plan: StarPlan
    page_size: int
    capacity: Mapping[int, int]

    def max_blocks(self, replica: int) -> float:
        """Blocks of B tokens that a replica can hold beside the anchor's copy, or the query and a token of output."""
        beside = max(self.plan.anchor_size // self.page_size, self._tail_pages(1))
        return max((self.capacity[replica] - beside) * self.page_size / self.plan.block_size, 0.0)

    def pages_of(self, assignments: Sequence[Assignment], params: Any) -> dict[int, int]:
        """Pages that a prompt with these assignments takes on each replica, at most all the pages of the replica.

        The replica of the first assignment also holds the query, and the output of each choice. Where it fetches the
        other replicas' pages it holds these too; the output then needs no reservation, since the other replicas have
        released their pages by then.

        Args:
            params: the request's sampling parameters.
        """
        num_pages: dict[int, int] = {}
        for number, assignment in enumerate(assignments):
            start, stop = block_range(self.plan, assignment.first, assignment.stop)
            tokens = stop - start
            if number:
                beside = self.plan.anchor_size // self.page_size
            elif self.plan.shards:
                beside = params.n * self._tail_pages(params.max_tokens)
            else:
                tokens, beside = self.plan.context_end, self._tail_pages(0)
            wanted = -(-tokens // self.page_size) + beside
            num_pages[assignment.replica] = min(wanted, self.capacity[assignment.replica])
        return num_pages

    def _tail_pages(self, output_tokens: int | None) -> int:
        """Pages of the query and the output; all pages of a replica where the length of the output is unknown."""
        if output_tokens is None:
            return max(self.capacity.values())
        return -(-(self.plan.num_prompt_tokens - self.plan.context_end + output_tokens) // self.page_size) + 1


def with_enough_replicas(plan: StarPlan, page_size: int, num_pages: int, max_replicas: int) -> StarPlan:
    """Return the plan with as many replicas as its KV needs.

    Args:
        page_size: tokens of a page.
        num_pages: of each replica.

    Raises:
        OptionError: ``max_replicas`` are not enough.
    """
    room = KVDemand(plan, page_size, {0: num_pages}).max_blocks(0)
    needed = replicas_needed(work(plan), room, max_replicas)
    if needed is None:
        reason = (
            f"{work(plan).sum():g} star blocks of {plan.block_size} tokens, anchor and query need more KV memory "
            f"than {max_replicas} replicas of {num_pages} pages of {page_size} tokens have"
        )
        raise OptionError(flat_name("shards"), "on", reason, "a shorter prompt, smaller blocks, or more memory")
    return replace(plan, replicas=max(plan.replicas, needed))
