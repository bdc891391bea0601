"""Pages that no request may use: a transfer that has failed may still write to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.logger import init_logger

from starling.vllm_compat.scheduler_view import SchedulerView

logger = init_logger("vllm.starling")


class Quarantine:
    """The pages of transfers that NIXL has not ended yet. They stay out of the pool until it has.

    Attributes:
        num_writers: page id -> how many transfers may write to the page.
    """

    def __init__(self, view: SchedulerView) -> None:
        self.view = view
        self.num_writers: Counter[int] = Counter()

    def add(self, page_ids: Sequence[int]) -> None:
        """Keep pages from the pool. To be called before vLLM frees the pages of requests that have ended."""
        self.view.pool.hold(self.view.pool.pages(set(page_ids) - self.num_writers.keys()))
        self.num_writers.update(page_ids)
        logger.error(
            "NIXL can't end a failed transfer, which may still write to %d KV pages: they stay out of use until it can "
            "(%d pages in all)",
            len(set(page_ids)),
            len(self.num_writers),
        )

    def free(self, page_ids: Iterable[int]) -> None:
        """Give pages back to the pool to which no transfer writes any more."""
        self.num_writers.subtract(page_ids)
        free = [page_id for page_id, count in self.num_writers.items() if count <= 0]
        for page_id in free:
            del self.num_writers[page_id]
        self.view.pool.release(self.view.pool.pages(free))
        logger.info("%d KV pages are in use again, and %d are not", len(free), len(self.num_writers))

    def replace_pages(self, requests: Iterable[Any]) -> list[Any]:
        """Give the requests that hold such pages other ones, whose content is computed; vLLM counts it as failed.

        Returns:
            The requests for which no pages are free.
        """
        group, stuck = self.view.groups[0], self.num_writers.keys()
        return [request for request in requests if not self.view.replace_pages(group, request.request_id, stuck)]
