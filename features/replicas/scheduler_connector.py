"""The scheduler's side of the connector between replicas: pages held for other replicas, and pages to fetch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from starling.features.replicas.connector_metadata import PageLoad, PageLoads, PageRead
from starling.scheduler.planning.request_metadata import PageSource, metadata_of
from starling.vllm_compat.kv_pages import Page, PagePool

logger = init_logger("vllm.starling")

COMPLETED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class Hold(NamedTuple):
    """Pages held for other replicas; ``number`` counts the holds of this replica from 1 (page_transfer.py)."""

    number: int
    pages: list[Page]


class SchedulerConnector:
    """Held pages by name, and the loads of the next step.

    Args:
        page_size: tokens of a KV page.

    Attributes:
        addresses: where the memory of each tensor-parallel rank is (page_transfer.py).
        opened_shards: names of held pages to which the workers may attend for other replicas.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.addresses: list[dict[str, Any]] = []
        self.opened_shards: set[str] = set()
        self.holds: dict[str, Hold] = {}
        self._num_holds = 0  # since the start, the released ones too
        self._released: list[int] = []  # numbers that the workers don't know yet
        self.num_users: Counter[str] = Counter()  # name -> requests here that begin with the pages
        self.release_later: set[str] = set()  # names whose last user releases the pages
        self._begun: set[str] = set()  # ids of requests that had pages to fetch, and have got their own pages
        self._loads: list[PageLoad] = []

    def set_addresses(self, metadata: dict[int, Any]) -> None:
        """Take the workers' handshake metadata, by tensor-parallel rank."""
        self.addresses = [metadata[rank].address for rank in sorted(metadata)]

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.pool = PagePool(gpu_block_pool)

    # Pages to fetch.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return the tokens to fetch from other replicas behind the cached ones, and whether that takes several steps.

        A request fetches when it begins. It fetches nothing where the pages are cached here: another choice of its
        prompt has fetched them. It fetches nothing where its own start is no longer cached: the fetched pages would
        have no beginning, and the whole prompt is computed here. It fetches nothing after a preemption either: the
        other replicas have released their pages by then, or may have.
        """
        fetch = metadata_of(request).fetch
        if fetch is None or request.request_id in self._begun:
            return 0, False
        start, stop = fetch.span(self.page_size)
        if num_computed_tokens < start:
            logger.warning(
                "%s: pages from position %d on were to be fetched, but the prefix cache ends at %d: "
                "they are computed here instead",
                request.request_id,
                start,
                num_computed_tokens,
            )
            return 0, False
        if num_computed_tokens >= stop:
            return 0, False
        return stop - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Make the load of a request whose pages for ``num_external_tokens`` fetched tokens are allocated."""
        fetch = metadata_of(request).fetch
        if fetch is None:
            return
        self._begun.add(request.request_id)
        if not num_external_tokens:
            return
        local_page_ids = blocks.get_block_ids()[0]
        first = (fetch.span(self.page_size)[1] - num_external_tokens) // self.page_size
        reads = []
        for source in fetch.sources:
            begin = source.start // self.page_size
            num_cached = max(first - begin, 0)
            remote_page_ids = source.page_ids[num_cached:]
            if remote_page_ids:
                begin += num_cached
                local = local_page_ids[begin : begin + len(remote_page_ids)]
                reads.append(PageRead(source.addresses, source.hold, remote_page_ids, local))
        self._loads.append(PageLoad(request.request_id, reads))

    def take_loads(self) -> PageLoads:
        """Return the loads made, and the holds released, since the last call."""
        loads = PageLoads(self._loads, self._released)
        self._loads, self._released = [], []
        return loads

    # Pages held for other replicas.

    def request_finished(self, request: Any, page_ids: list[int]) -> dict[str, Any] | None:
        """Hold the pages of a part of a prompt that is complete.

        Args:
            page_ids: all pages of the request.

        Returns:
            The request's kv_transfer_params, from which the front learns where the part's pages are; None where no
            pages are held.
        """
        self._begun.discard(request.request_id)
        metadata = metadata_of(request)
        if metadata.remote is not None:
            self._end_remote_attention(metadata.remote.local_name)
        part = metadata.part
        if part is None or request.status not in COMPLETED:
            return None
        held = page_ids[part.start // self.page_size : request.num_prompt_tokens // self.page_size]
        pages = self.pool.pages(held)
        self.pool.hold(pages)
        self._num_holds += 1
        self.holds[part.name] = Hold(self._num_holds, pages)
        source = PageSource(part.start, held, self.addresses, self._num_holds)
        return {"name": part.name, "source": vars(source)}

    def held_pages(self, name: str) -> list[Page]:
        """Return the pages held under a name.

        Raises:
            KeyError: no pages are held under it.
        """
        return self.holds[name].pages

    def begin_remote_attention(self, local_name: str) -> None:
        """Begin the remote attention of a request that begins with the pages held under a name."""
        self.num_users[local_name] += 1

    def _end_remote_attention(self, local_name: str) -> None:
        self.num_users[local_name] -= 1
        if not self.num_users[local_name]:
            del self.num_users[local_name]
            if local_name in self.release_later:
                self.release_later.discard(local_name)
                self.release([local_name])

    def begin_shard(self, name: str) -> list[int]:
        """Ids of the pages held under a name, to which the workers are about to attend for other replicas.

        Raises:
            ValueError: no pages are held under the name.
        """
        if name not in self.holds:
            raise ValueError(f"no pages are held as {name}")
        self.opened_shards.add(name)
        return [page.block_id for page in self.holds[name].pages]

    def release(self, names: Iterable[str]) -> None:
        """Release the pages held under these names; unknown names hold none. Workers must not read them any more.

        Pages with which a request here begins are released when the request has ended: after a preemption it needs them
        again.
        """
        for name in names:
            self.opened_shards.discard(name)
            if self.num_users[name]:
                self.release_later.add(name)
                continue
            if name in self.holds:
                hold = self.holds.pop(name)
                self._released.append(hold.number)
                self.pool.release(reversed(hold.pages))
