"""Pages between two agents: copied whole, to the right places, and refused where the layouts differ."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, compute_layout_strides, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from starling.features.replicas import page_transfer
from starling.features.replicas.network import make_agent
from starling.features.replicas.page_transfer import (
    WORDS,
    PageReader,
    SourceRead,
    Transfer,
    TransferError,
    bytes_per_page,
    consecutive,
    layout_mismatch,
    next_wave,
)
from tests.unit.lines_run import lines_run

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
    readers = PageReader("ours", ours, PAGES, LAYOUT, 30.0), PageReader("theirs", theirs, PAGES, LAYOUT, 30.0)
    yield ours, theirs, *readers
    for reader in readers:
        reader.close()


def wait(reader: PageReader, transfer: Transfer) -> None:
    deadline = time.monotonic() + 300
    while not reader.is_done(transfer):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pages_arrive_whole_in_every_layer_and_others_stay(pair):
    ours, theirs, reader, other = pair
    before = {name: cache.clone() for name, cache in ours.items()}
    transfer = Transfer()
    reader.begin(transfer, other.address(), 1, [3, 4, 1], [2, 3, 7])
    wait(reader, transfer)
    for name, cache in ours.items():
        pages, source = cache.view(PAGES, 2, -1), theirs[name].view(PAGES, 2, -1)
        assert torch.equal(pages[[2, 3, 7]], source[[3, 4, 1]])
        untouched = [0, 1, 4, 5, 6]
        assert torch.equal(pages[untouched], before[name].view(PAGES, 2, -1)[untouched])
    assert transfer.num_bytes == 3 * 2 * 2 * 2 * 16 * 8 * 4


@pytest.mark.parametrize(
    ("released", "hold", "held"),
    [
        ([], 1, True),
        ([1, 3], 2, True),
        ([2], 2, False),
        ([2], 2 + WORDS, True),
        ([2 + WORDS], 2, False),
        ([2 + WORDS, 2], 2 + WORDS, False),
    ],
    ids=["none", "others", "this one", "an earlier one of its word", "a later one of its word", "this one first"],
)
def test_pages_count_if_they_were_held_until_they_had_arrived(pair, released, hold, held):
    """A reader that has stood still may begin after the source has released the pages."""
    _, _, reader, other = pair
    other.holds.note_released(released)
    transfer = Transfer()
    reader.begin(transfer, other.address(), hold, [3, 4], [2, 3])
    if held:
        wait(reader, transfer)
        other.holds.note_released([hold])
        assert reader.is_done(transfer)
    else:
        with pytest.raises(TransferError, match="theirs had released the pages before they arrived"):
            wait(reader, transfer)
        reader.cancel(transfer)
    assert len(reader.holds._unused) == WORDS


def test_an_answer_that_may_still_arrive_is_used_by_no_other_read(pair, monkeypatch):
    _, _, reader, other = pair
    transfer = Transfer()
    reader.begin(transfer, other.address(), 1, [3], [2])
    (read,) = transfer.reads
    deadline = time.monotonic() + 300
    while read.answer is None:
        assert time.monotonic() < deadline
        reader.is_done(transfer)
    monkeypatch.setattr(reader.agent, "release_xfer_handle", lambda handle: 1 / 0)
    reader.cancel(transfer)
    reader.retry_releases()
    assert read.answer not in reader.holds._unused
    assert reader.take_stuck_pages() == ([], [])
    monkeypatch.undo()
    reader.retry_releases()
    assert sorted(reader.holds._unused) == list(range(WORDS))


def test_idle_readers_take_no_core(pair):
    """With NIXL's own setting each of them spins: the share is 2 for two of them, on free cores, in each second."""

    def share_of_a_core() -> float:
        worked, began = time.process_time(), time.monotonic()
        time.sleep(1)
        return (time.process_time() - worked) / (time.monotonic() - began)

    assert any(share_of_a_core() < 0.2 for _ in range(10))


def test_another_layout_is_refused_with_both_sides_values(pair):
    ours, _, reader, other = pair
    before = {name: cache.clone() for name, cache in ours.items()}
    address = other.address()
    address["layout"] = address["layout"] | {"dtype": "bfloat16", "page_tokens": 64}
    with pytest.raises(TransferError, match="dtype 'float32' here, 'bfloat16' there; page_tokens 32 here, 64 there"):
        reader.begin(Transfer(), address, 1, [0], [0])
    assert all(torch.equal(ours[name], before[name]) for name in ours)


def test_a_peer_that_is_not_there_is_an_error(pair):
    _, _, reader, other = pair
    with pytest.raises(TransferError, match="can't read from nobody"):
        reader.begin(Transfer(), other.address() | {"name": "nobody", "metadata": b"no metadata"}, 1, [0], [0])


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(page_transfer.time, "monotonic", made.read)
    return made


def test_a_source_that_times_out_is_disconnected_and_can_be_read_again(pair, clock, monkeypatch):
    ours, theirs, reader, other = pair
    transfer = Transfer()
    reader.begin(transfer, other.address(), 1, [0], [0])
    monkeypatch.setattr(reader.agent, "check_xfer_state", lambda handle: "PROC")
    clock.now += 29
    assert not reader.is_done(transfer)
    clock.now += 2
    with pytest.raises(TransferError, match="no page has arrived from theirs for 30 s"):
        reader.is_done(transfer)
    reader.cancel(transfer)
    assert not transfer.reads
    monkeypatch.undo()
    again = Transfer()
    reader.begin(again, other.address(), 1, [5], [6])
    wait(reader, again)
    assert torch.equal(ours["layer.1"].view(PAGES, -1)[6], theirs["layer.1"].view(PAGES, -1)[5])


def test_a_slow_transfer_that_makes_progress_does_not_time_out(pair, clock, monkeypatch):
    """Eight pages at 25 s each, 200 s in all; every page arrives."""
    ours, theirs, reader, other = pair
    monkeypatch.setattr(page_transfer, "FIRST_WAVE_BYTES", 1)  # a page at a time
    finished, slow = reader.agent.check_xfer_state, True
    monkeypatch.setattr(reader.agent, "check_xfer_state", lambda handle: "PROC" if slow else finished(handle))
    transfer = Transfer()
    reader.begin(transfer, other.address(), 1, range(PAGES), range(PAGES))
    for page in range(PAGES):
        (read,), slow = transfer.reads, True
        clock.now += 25
        assert not reader.is_done(transfer) and read.num_begun == page + 1
        slow = False
        deadline = time.monotonic() + 300
        while not reader.is_done(transfer) and read.num_begun == page + 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not transfer.reads and transfer.seconds == 200
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_waves_of_a_link_follow_what_it_has_carried(pair, clock, monkeypatch):
    """Of eight pages, read again and again: one page and then the rest; all at once; and fewer when it gets slow."""
    _, _, reader, other = pair
    monkeypatch.setattr(page_transfer, "FIRST_WAVE_BYTES", 1)  # a page at a time

    def waves(seconds: float) -> list[int]:
        """The pages of the waves of a read, of which each takes so long."""
        transfer, begun = Transfer(), [0]
        reader.begin(transfer, other.address(), 1, range(PAGES), range(PAGES))
        (read,) = transfer.reads
        deadline = time.monotonic() + 300
        while read.answer is None:
            if read.num_begun != begun[-1]:
                begun.append(read.num_begun)
                clock.now += seconds
            reader.is_done(transfer)
            assert time.monotonic() < deadline
        wait(reader, transfer)
        return [stop - start for start, stop in itertools.pairwise(begun)]

    assert waves(0.01) == [1, 7]
    assert waves(0.01) == waves(0.01) == [8]
    assert waves(16) == [8]
    assert waves(1) == [1, 2, 4, 1]
    assert waves(0.01) == [8]
    transfer = Transfer()
    reader.begin(transfer, other.address(), 1, range(PAGES), range(PAGES))
    reader.cancel(transfer)
    assert waves(0.01) == [1, 7], "a link that has failed begins anew"
    monkeypatch.setattr(page_transfer, "FIRST_WAVE_BYTES", 4 * reader.page_bytes)
    assert waves(0.01) == [8]
    assert waves(20) == [8]
    assert waves(0.01) == [4, 4], "steps of many seconds do not make the first wave smaller than that of a new link"


def test_of_two_sources_the_one_that_times_out_is_found(clock):
    """The pages of one source do not extend the timeout of the other."""
    reader = object.__new__(PageReader)
    reader.agent = SimpleNamespace(
        check_xfer_state=lambda handle: "DONE" if handle == "talks" else "PROC",
        release_xfer_handle=lambda handle: None,
        initialize_xfer=lambda kind, local, remote, name: name,
        transfer=lambda handle: "PROC",
    )
    reader.stuck, reader.holds = [], SimpleNamespace(free_answer=lambda answer: None)
    reader.connected, reader.timeout = {"talks": "talks", "silent": "silent"}, 30.0
    reader.waves = {}
    reader._descriptors = lambda *_: (None, None)
    transfer = Transfer()
    for name in reader.connected:
        read = SourceRead({"name": name}, 1, range(2**50), range(2**50), 1)
        transfer.reads.append(read)
        reader._begin_read(read, reader._wave)
    with pytest.raises(TransferError, match="from silent"):
        for _ in range(40):
            clock.now += 1
            reader.is_done(transfer)
    assert clock.now == 1031


@pytest.mark.parametrize(
    ("pages", "seconds", "expected"),
    [(100, 2.0, 100), (100, 4.0, 50), (100, 1.0, 200), (100, 0.001, 800), (1, 25.0, 1)],
    ids=["as planned", "slow", "fast", "at most eight times", "at least one page"],
)
def test_a_wave_has_the_pages_that_arrive_in_two_seconds(pages, seconds, expected):
    assert next_wave(pages, seconds) == expected


def test_pages_that_are_consecutive_on_both_sides_are_merged():
    runs = consecutive([4, 5, 6, 9, 10, 2], [1, 2, 3, 4, 6, 7])
    assert [part.tolist() for part in runs] == [[4, 9, 10, 2], [1, 4, 6, 7], [3, 1, 1, 1]]
    assert [part.tolist() for part in consecutive([0], [0])] == [[0], [0], [1]]
    assert [part.tolist() for part in consecutive([], [])] == [[], [], []]


SCATTERED = list(range(8192, 0, -1))
"""Pages of a prompt of 131,072 tokens, no two of which are consecutive."""


@pytest.fixture
def lists(monkeypatch):
    """A reader of 32 layers, with an agent of NIXL, and what it gives to NIXL for its lists."""
    reader, given = object.__new__(PageReader), []
    reader.bases, reader.strides = np.arange(32) * 2**40, np.full(32, 4096)
    reader.device, reader.memory, reader.agent = 0, "DRAM", make_agent("lists")
    make_list = reader.agent.get_xfer_descs

    def get_xfer_descs(descs, memory):
        given.append(descs)
        return make_list(descs, memory)

    monkeypatch.setattr(reader.agent, "get_xfer_descs", get_xfer_descs)
    return reader, given


def test_nixl_gets_arrays_and_no_tuple_for_each_page(lists):
    """A list would have 262,144 tuples a side, which the worker would make between two steps."""
    reader, given = lists
    address = {"bases": (np.arange(32) * 2**41).tolist(), "device": 1}
    made = reader._descriptors(address, SCATTERED, range(8192))
    assert [type(descriptors) for descriptors in given] == [np.ndarray, np.ndarray]
    assert [descriptors.descCount() for descriptors in made] == [32 * 8192, 32 * 8192]
    local, remote = ({descriptors[index] for index in range(32 * 8192)} for descriptors in made)
    assert local == {(base * 2**40 + page * 4096, 4096, 0) for base in range(32) for page in range(8192)}
    assert remote == {(base * 2**41 + page * 4096, 4096, 1) for base in range(32) for page in SCATTERED}


def test_the_work_of_lists_for_nixl_does_not_grow_with_the_pages(lists):
    reader, _ = lists
    address = {"bases": list(range(32)), "device": 0}
    assert lines_run(lambda: reader._descriptors(address, SCATTERED, range(8192))) < 200


@pytest.mark.parametrize(
    ("cache", "size"),
    [(torch.zeros(4, 2, 3), 4 * 2 * 3 * 4 // 4), (torch.zeros(8, 3), 2 * 3 * 4)],
    ids=["one kernel page", "two kernel pages"],
)
def test_bytes_of_a_page(cache, size):
    assert bytes_per_page(cache, 4) == size


@pytest.mark.parametrize(
    "cache",
    [torch.zeros(2, 4, 3), torch.zeros(4, 6)[:, :3], torch.zeros(3, 4, 2).transpose(0, 1), torch.zeros(6, 3)],
    ids=["K and V apart", "gaps", "heads apart", "no multiple"],
)
def test_pages_that_do_not_lie_in_one_piece_are_refused(cache):
    with pytest.raises(TransferError, match="one piece"):
        bytes_per_page(cache, 4)


def vllm_caches(layout: KVCacheLayout, kernel_page_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The caches of two layers as vLLM makes them, and the memory behind them."""
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=8, dtype=torch.float32)
    memory = torch.zeros(2 * PAGES * spec.page_size_bytes, dtype=torch.int8)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, PAGES, 2, layout)
    placement = KVCacheTensor(len(memory), ["layer.0", "layer.1"], layer_stride, block_stride)
    views = create_kv_cache_views(memory, spec, PAGES, layout, placement, kernel_page_size)
    return dict(zip(placement.layers, views, strict=True)), memory


@pytest.mark.parametrize("kernel_page_size", [32, 16])
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC], ids=lambda layout: layout.name)
def test_pages_move_in_the_layouts_in_which_vllm_has_them_in_one_piece(layout, kernel_page_size):
    """LBNHC is vLLM's default on most GPUs."""
    ours, _ = vllm_caches(layout, kernel_page_size)
    theirs, memory = vllm_caches(layout, kernel_page_size)
    memory.view(torch.float32).normal_()
    readers = PageReader("ours", ours, PAGES, LAYOUT, 30.0), PageReader("theirs", theirs, PAGES, LAYOUT, 30.0)
    transfer = Transfer()
    readers[0].begin(transfer, readers[1].address(), 1, [3, 4, 1], [2, 3, 7])
    wait(readers[0], transfer)
    for name, cache in ours.items():
        pages, source = cache.unflatten(0, (PAGES, -1)), theirs[name].unflatten(0, (PAGES, -1))
        assert torch.equal(pages[[2, 3, 7]], source[[3, 4, 1]])
        assert not pages[[0, 1, 4, 5, 6]].any()
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("layout", [KVCacheLayout.BLHNC, KVCacheLayout.LHBNC], ids=lambda layout: layout.name)
def test_other_layouts_of_vllm_are_refused_with_those_that_are_not(layout):
    caches, _ = vllm_caches(layout, 32)
    with pytest.raises(TransferError, match="VLLM_KV_CACHE_LAYOUT unset, or set it to LBHNC or LBNHC"):
        PageReader("ours", caches, PAGES, LAYOUT, 30.0)


def test_equal_layouts_match():
    assert layout_mismatch({"a": 1}, {"a": 1}) is None
    assert layout_mismatch({"a": 1}, {}) == "KV pages have another layout: a 1 here, None there"
