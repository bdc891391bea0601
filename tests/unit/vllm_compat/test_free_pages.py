"""The order in which vLLM's block pool gives out free pages, some of which are retained."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from starling.vllm_compat.free_pages import FreePages, Retention
from starling.vllm_compat.kv_pages import PagePool

LOW, NORMAL, HIGH = Retention


def make_pool(num_pages: int, share: float = 0.5) -> tuple[PagePool, FreePages]:
    pool = PagePool(BlockPool(num_pages + 1, enable_caching=True, hash_block_size=16))
    return pool, FreePages.of(pool, share)


def fill(pool: PagePool, number: int, first: int = 0) -> list:
    """Pages with content, which are held."""
    pages = pool.take(number)
    for index, page in enumerate(pages, first):
        pool.cache(page, b"%d" % index, 16)
    return pages


def order(pool: PagePool) -> list[int]:
    return [page.block_id for page in pool.block_pool.free_block_queue.get_all_free_blocks()]


def test_pages_make_room_by_what_is_said_of_them() -> None:
    pool, free = make_pool(8)
    a, b, c, d, *rest = fill(pool, 8)
    free.retain([a, b], HIGH)
    free.retain([d], LOW)
    pool.release([a, b])
    pool.release([c, d, *rest])
    ids = [page.block_id for page in (d, c, *rest, a, b)]
    assert order(pool) == ids
    assert [page.block_id for page in pool.take(8)] == ids
    assert not free.retained
    assert not free.retention


def test_a_page_without_content_makes_room_first_whatever_is_said_of_it() -> None:
    pool, free = make_pool(3)
    full, empty = fill(pool, 1)[0], pool.take(1)[0]
    free.retain([empty, full], HIGH)
    pool.release([full, empty])
    assert order(pool) == [empty.block_id, 3, full.block_id]


def test_above_the_share_the_first_retained_page_makes_room_before_the_others() -> None:
    pool, free = make_pool(4, share=0.5)
    a, b, c, d = fill(pool, 4)
    free.retain([a, b, c], HIGH)
    pool.release([a, b, c])
    pool.release([d])
    assert order(pool) == [page.block_id for page in (a, d, b, c)]
    assert len(free.retained) == 2


def test_a_hit_page_stays_retained_and_one_that_is_let_go_does_not() -> None:
    pool, free = make_pool(4)
    a, b, c, d = fill(pool, 4)
    free.retain([a, b], HIGH)
    pool.release([a, b])
    pool.hold([a])
    pool.release([a])
    pool.release([c])
    free.forget([b])
    pool.release([d])
    assert order(pool) == [page.block_id for page in (c, b, d, a)]


@given(
    st.integers(1, 12),
    st.sampled_from((0.0, 0.3, 1.0)),
    st.lists(st.tuples(st.sampled_from(("take", "retain", "release", "hold", "forget")), st.integers(0, 99))),
)
def test_each_free_page_is_queued_once_and_retained_ones_are_the_end(size: int, share: float, steps: list) -> None:
    pool, free = make_pool(size, share)
    held: list = []
    for number, (step, choice) in enumerate(steps):
        released = [page for page in pool.pages(order(pool)) if page.block_hash is not None]
        if step == "take" and pool.num_free_pages:
            held += fill(pool, 1 + choice % pool.num_free_pages, number * 100)
        elif step == "retain":
            free.retain(held[: choice % 5], Retention(choice % 3))
        elif step == "release" and held:
            pool.release(held[: 1 + choice % len(held)])
            held = held[1 + choice % len(held) :]
        elif step == "hold" and released:
            page = released[choice % len(released)]
            pool.hold([page])
            held.append(page)
        elif step == "forget":
            free.forget(pool.pages(range(1, 1 + choice % size)))
        ids, retained = order(pool), list(free.retained)
        assert sorted([*ids, *{page.block_id for page in held}]) == list(range(1, size + 1))
        assert free.num_free_blocks == len(ids)
        assert ids[len(ids) - len(retained) :] == retained
        assert len(retained) <= share * size
