"""Order in which cached pages are evicted: by what requests say of their prompts, and for sessions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from vllm.logger import init_logger

from starling.config.entry import StarlingConfig
from starling.scheduler.part import CorePart
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import metadata_of
from starling.scheduler.provenance import scheduler_metrics
from starling.vllm_compat.free_pages import FreePages, Retention
from starling.vllm_compat.kv_pages import CacheGroup, Page
from starling.vllm_compat.scheduler_view import SchedulerView

logger = init_logger("vllm.starling")

Session = int
"""A hash of the salt and the id of a session's requests, which a client may choose at any length."""

MAX_SESSIONS = 4096
"""Sessions whose pages are known; of older ones, pages stay retained until they make room."""

WORDS = {retention.name.lower(): retention for retention in Retention}


def ranges_of(words: str | tuple[str, ...], plan: StarPlan | None, num_tokens: int) -> Iterator[tuple[int, int, str]]:
    """Start, end and word of each range of a request's tokens for which something is said.

    The head, which all documents depend on, has the highest of their words. Of the question nothing is said.
    """
    if isinstance(words, str):
        yield 0, num_tokens, words
        return
    assert plan is not None, "words of documents need documents"
    documents = plan.documents_behind_head
    yield 0, documents[0][0], max(words, key=WORDS.__getitem__)
    for (start, end), word in zip(documents, words, strict=True):
        yield start, end, word


class RetainedPages(CorePart):
    """Says of a request's pages, as it ends, when they make room.

    A session (vLLM's ``session_id``) has the pages of its last request whose prompt was computed. What that one no
    longer has, as after a summary of the conversation, stays by its last use again. Where a request says that its pages
    make room, those of a session stay, and those that it has found in the cache: others have them too.
    """

    def __init__(self, scheduler: Any, share: float) -> None:
        self.view = SchedulerView(scheduler)
        self.free = FreePages.of(self.view.pool, share)
        self.sessions: OrderedDict[Session, set[int]] = OrderedDict()
        self.owner: dict[int, Session | None] = {}  # page -> the session that has retained it last; None: a request
        self.found: dict[str, int] = {}  # request that makes room -> tokens of its prompt that were cached
        self.adopted: dict[str, set[int]] = {}  # such a request -> numbers of its pages that were cached behind a hole
        self.counted = 0

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> RetainedPages | None:
        share = config.scheduling.retained_share
        if not share or not scheduler.cache_config.enable_prefix_caching:
            return None
        if not scheduler.view.has_one_pool:
            logger.warning("No page is retained: a group of layers has a pool of pages of its own")
            return None
        return cls(scheduler, share)

    def scheduled(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            if "low" in (metadata_of(new).retention or "") and new.req_id not in self.found:
                self.found[new.req_id] = self.view.local_cached_tokens(new.req_id)

    def note_adopted(self, request: Any, first: int, pages: Sequence[Page]) -> None:
        """Note the pages that a request has found in the cache behind a hole, of which ``first`` is the first one."""
        if "low" in (metadata_of(request).retention or ""):
            self.adopted.setdefault(request.request_id, set()).update(range(first, first + len(pages)))

    def outputs(self, outputs: dict[int, Any]) -> None:
        number = len(self.free.retained)
        if number != self.counted:
            self.counted = number
            scheduler_metrics().retained_pages.set(number)

    def pages_freed(self, request: Any) -> None:
        """Note the pages of a request that has ended; a preempted one comes back."""
        if not request.is_finished():
            return
        metadata = metadata_of(request)
        words, found = metadata.retention, self.found.pop(request.request_id, 0)
        adopted = self.adopted.pop(request.request_id, set())
        session = hash((request.cache_salt, request.session_id)) if request.session_id and words is None else None
        if (words is None and session is None) or metadata.part is not None:
            return
        kept: set[int] = set()
        for group in self.view.groups:
            for start, end, word in ranges_of(words or "high", metadata.plan, request.num_tokens):
                first, left = (max(start, found), adopted) if word == "low" else (start, set[int]())
                pages = pages_between(group, request.request_id, first, end, left)
                if word != "high":
                    pages = [page for page in pages if not self._is_of_a_session(page)]
                self.free.retain(pages, WORDS[word])
                kept.update(page.block_id for page in pages)
        self._own(session, kept)
        if session is not None and request.num_computed_tokens >= request.num_prompt_tokens:
            self._let_go(session, kept)
        elif session is not None:  # it was ended before
            self._keep(session, self.sessions.get(session, set()) | kept)

    def _own(self, session: Session | None, kept: Iterable[int]) -> None:
        """Note whose pages these are now: a page is of one session at most."""
        for number in kept:
            before = self.owner.get(number)
            if before is not None and before != session and before in self.sessions:
                self.sessions[before].discard(number)
            self.owner[number] = session

    def _is_of_a_session(self, page: Page) -> bool:
        is_retained = self.free.retention.get(page.block_id) == Retention.HIGH
        return is_retained and self.owner.get(page.block_id) is not None

    def _let_go(self, session: Session, kept: set[int]) -> None:
        """Let go what a session had, and has no longer.

        Sessions of other salts are others: a client can't free another tenant's pages by a guess of its session.
        """
        self.free.forget(self.view.pool.pages(self.sessions.get(session, set()) - kept))
        self._keep(session, kept)

    def _keep(self, session: Session, kept: set[int]) -> None:
        self.sessions.pop(session, None)
        self.sessions[session] = kept
        if len(self.sessions) > MAX_SESSIONS:
            self.sessions.popitem(last=False)


def ranges_with(word: str, request: Any) -> list[tuple[int, int]]:
    """Start and end of the ranges of a request's tokens for which it says a word."""
    metadata = metadata_of(request)
    if metadata.retention is None:
        return []
    ranges = ranges_of(metadata.retention, metadata.plan, request.num_tokens)
    return [(start, end) for start, end, found in ranges if found == word]


def pages_between(group: CacheGroup, request_id: str, start: int, end: int, left: Container[int]) -> list[Page]:
    """Return a request's pages in a KV cache group for tokens ``start`` to ``end``, without ``left``.

    Args:
        left: numbers of pages of the request.
    """
    first = start // group.page_size
    pages = group.pages(request_id)[first : -(-end // group.page_size)]
    return [page for number, page in enumerate(pages, first) if not page.is_null and number not in left]


PARTS = (RetainedPages.make,)
