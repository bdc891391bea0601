"""Pages between two agents: copied whole, to where they belong, and refused where the layouts differ."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from scheduler import page_mover
from scheduler.page_mover import Move, MoveError, PageMover, Read, consecutive, mismatch, next_wave, page_bytes

PAGES = 8
LAYOUT = {"dtype": "float32", "page_tokens": 32}


def caches(first: float) -> dict[str, torch.Tensor]:
    """Two layers; the kernel's pages are half of the scheduler's."""
    shape = (2 * PAGES, 2, 16, 8)
    layers = {f"layer.{index}": torch.zeros(shape) for index in range(2)}
    for index, cache in enumerate(layers.values()):
        cache += first + index + torch.arange(2 * PAGES).view(-1, 1, 1, 1) / 100
    return layers


@pytest.fixture
def pair():
    ours, theirs = caches(10.0), caches(50.0)
    movers = PageMover("ours", ours, PAGES, LAYOUT), PageMover("theirs", theirs, PAGES, LAYOUT)
    yield ours, theirs, *movers
    for mover in movers:
        mover.close()


def wait(mover: PageMover, move: Move) -> None:
    deadline = time.monotonic() + 20
    while not mover.done(move):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pages_arrive_whole_in_every_layer_and_others_stay(pair):
    ours, theirs, mover, other = pair
    before = {name: cache.clone() for name, cache in ours.items()}
    move = Move()
    mover.read(move, other.address(), [3, 4, 1], [2, 3, 7])
    wait(mover, move)
    for name, cache in ours.items():
        pages, source = cache.view(PAGES, 2, -1), theirs[name].view(PAGES, 2, -1)
        assert torch.equal(pages[[2, 3, 7]], source[[3, 4, 1]])
        untouched = [0, 1, 4, 5, 6]
        assert torch.equal(pages[untouched], before[name].view(PAGES, 2, -1)[untouched])
    assert move.bytes == 3 * 2 * 2 * 2 * 16 * 8 * 4


def test_movers_that_have_nothing_to_move_take_no_core(pair):
    """NIXL's own setting makes each spin: 2 for two of them, on cores that are free."""
    worked, began = time.process_time(), time.monotonic()
    time.sleep(1)
    assert (time.process_time() - worked) / (time.monotonic() - began) < 0.2


def test_another_layout_is_refused_with_both_sides_values(pair):
    ours, _, mover, other = pair
    before = {name: cache.clone() for name, cache in ours.items()}
    address = other.address()
    address["layout"] = address["layout"] | {"dtype": "bfloat16", "page_tokens": 64}
    with pytest.raises(MoveError, match="dtype 'float32' here, 'bfloat16' there; page_tokens 32 here, 64 there"):
        mover.read(Move(), address, [0], [0])
    assert all(torch.equal(ours[name], before[name]) for name in ours)


def test_a_peer_that_is_not_there_is_an_error(pair):
    _, _, mover, other = pair
    with pytest.raises(MoveError, match="can't read from nobody"):
        mover.read(Move(), other.address() | {"name": "nobody", "metadata": b"no metadata"}, [0], [0])


class Clock:
    """Time that stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(page_mover, "time", made)
    return made


def test_a_source_that_falls_silent_is_given_up_and_can_be_read_again(pair, clock, monkeypatch):
    ours, theirs, mover, other = pair
    move = Move()
    mover.read(move, other.address(), [0], [0])
    monkeypatch.setattr(mover.agent, "check_xfer_state", lambda handle: "PROC")
    clock.now += 29
    assert not mover.done(move)
    clock.now += 2
    with pytest.raises(MoveError, match="nothing has come from theirs for 30 s"):
        mover.done(move)
    mover.give_up(move)
    assert not move.reads
    monkeypatch.undo()
    again = Move()
    mover.read(again, other.address(), [5], [6])
    wait(mover, again)
    assert torch.equal(ours["layer.1"].view(PAGES, -1)[6], theirs["layer.1"].view(PAGES, -1)[5])


def test_a_slow_transfer_that_goes_on_is_none_without_end(pair, clock, monkeypatch):
    """Eight pages at 25 s each: 200 s in all, and every one of them is there at the end."""
    ours, theirs, mover, other = pair
    monkeypatch.setattr(page_mover, "FIRST_WAVE_BYTES", 1)  # a page at a time
    finished, slow = mover.agent.check_xfer_state, True
    monkeypatch.setattr(mover.agent, "check_xfer_state", lambda handle: "PROC" if slow else finished(handle))
    move = Move()
    mover.read(move, other.address(), range(PAGES), range(PAGES))
    for page in range(PAGES):
        (read,), slow = move.reads, True
        clock.now += 25
        assert not mover.done(move) and read.begun == page + 1
        slow = False
        deadline = time.monotonic() + 20
        while not mover.done(move) and read.begun == page + 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not move.reads and move.seconds == 200
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_of_two_sources_the_silent_one_is_found(clock):
    """The other's pages are no sign of life of it."""
    mover = object.__new__(PageMover)
    mover.agent = SimpleNamespace(
        check_xfer_state=lambda handle: "DONE" if handle == "talks" else "PROC",
        release_xfer_handle=lambda handle: None,
        initialize_xfer=lambda kind, local, remote, name: name,
        transfer=lambda handle: "PROC",
    )
    mover.peers, mover.silence = {"talks": "talks", "silent": "silent"}, 30.0
    mover._descriptors = lambda *_: (None, None)
    move = Move()
    for name in mover.peers:
        read = Read({"name": name}, range(1000), range(1000), 1)
        move.reads.append(read)
        mover._begin_wave(read)
    with pytest.raises(MoveError, match="from silent"):
        for _ in range(40):
            clock.now += 1
            mover.done(move)
    assert clock.now == 1031


@pytest.mark.parametrize(
    ("pages", "seconds", "then"),
    [(100, 2.0, 100), (100, 4.0, 50), (100, 1.0, 200), (100, 0.001, 800), (1, 25.0, 1)],
    ids=["as meant", "slow", "fast", "no more than eight times", "a page at least"],
)
def test_a_wave_has_the_pages_that_come_in_two_seconds(pages, seconds, then):
    assert next_wave(pages, seconds) == then


def test_runs_of_pages_are_merged_where_both_sides_go_on():
    assert list(consecutive([4, 5, 6, 9, 10, 2], [1, 2, 3, 4, 6, 7])) == [(4, 1, 3), (9, 4, 1), (10, 6, 1), (2, 7, 1)]
    assert list(consecutive([], [])) == []


@pytest.mark.parametrize(
    ("cache", "size"),
    [(torch.zeros(4, 2, 3), 4 * 2 * 3 * 4 // 4), (torch.zeros(8, 3), 2 * 3 * 4)],
    ids=["one kernel page", "two kernel pages"],
)
def test_bytes_of_a_page(cache, size):
    assert page_bytes(cache, 4) == size


@pytest.mark.parametrize(
    "cache",
    [torch.zeros(2, 4, 3), torch.zeros(4, 6)[:, :3], torch.zeros(4, 3, 2).transpose(1, 2), torch.zeros(6, 3)],
    ids=["K and V apart", "gaps", "not contiguous", "no multiple"],
)
def test_pages_that_do_not_lie_in_one_piece_are_refused(cache):
    with pytest.raises(MoveError, match="one piece"):
        page_bytes(cache, 4)


def test_equal_layouts_match():
    assert mismatch({"a": 1}, {"a": 1}) is None
    assert mismatch({"a": 1}, {}) == "KV pages have another layout: a 1 here, None there"
