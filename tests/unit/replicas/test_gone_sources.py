"""Connections of NIXL to servers that are gone, or were restarted, which are another server then.

On NIXL itself: ``check_remote_metadata`` says whether an agent knows another one.
"""

from __future__ import annotations

import time

import pytest
import torch

from starling.features.replicas.agents import server_of
from starling.features.replicas.page_transfer import PageReader, Transfer, TransferError

PAGES = 8
LAYOUT = {"dtype": "float32"}


def reader(name: str) -> PageReader:
    made = PageReader(name, {"layer": (cache := torch.zeros(PAGES, 2, 16, 8))}, PAGES, LAYOUT, 30.0)
    made.cache = cache  # NIXL has registered its memory
    return made


@pytest.fixture
def ours():
    made = reader("ours-0")
    yield made
    made.close()


@pytest.fixture
def start():
    """Starts another server's worker; all are closed at the end."""
    made = []

    def start(name: str) -> PageReader:
        made.append(reader(name))
        return made[-1]

    yield start
    for each in made:
        each.close()


def wait(ours: PageReader, transfer: Transfer) -> None:
    deadline = time.monotonic() + 300
    while not ours.is_done(transfer):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def begin(ours: PageReader, source: PageReader) -> Transfer:
    transfer = Transfer()
    ours.begin(transfer, source.address(), 1, [3, 4], [2, 3])
    return transfer


def known(ours: PageReader, *sources: PageReader) -> list[bool]:
    return [ours.agent.check_remote_metadata(source.agent.name) for source in sources]


def test_only_the_last_of_the_servers_that_were_restarted_at_one_address_is_known(ours, start):
    servers = [start(f"server {number}-0") for number in range(5)]
    for before, server in zip([None, *servers], servers, strict=False):
        if before is not None:
            ours.forget([server_of(before.agent.name)])
        wait(ours, begin(ours, server))
    assert known(ours, *servers) == [False, False, False, False, True]
    assert list(ours.connected) == ["server 4-0"]


def test_other_servers_and_their_ranks_stay_known(ours, start):
    gone, stays = [start(f"a-{rank}") for rank in range(2)], [start(f"b-{rank}") for rank in range(2)]
    for source in (*gone, *stays):
        wait(ours, begin(ours, source))
    ours.forget(["a", "never seen"])
    assert known(ours, *gone, *stays) == [False, False, True, True]


def test_a_server_that_is_read_is_forgotten_when_its_last_read_has_ended(ours, start):
    source = start("a-0")
    transfers = [begin(ours, source) for _ in range(2)]
    ours.forget(["a"])
    for transfer in transfers:
        assert known(ours, source) == [True]
        wait(ours, transfer)
    assert known(ours, source) == [False]
    assert not ours.num_reads


def test_a_server_that_is_back_before_its_last_read_has_ended_stays_known(ours, start):
    """It was only out of reach for a while."""
    source = start("a-0")
    first = begin(ours, source)
    ours.forget(["a"])
    second = begin(ours, source)
    for transfer in (first, second):
        wait(ours, transfer)
    assert known(ours, source) == [True]


def test_a_server_with_a_read_that_nixl_does_not_end_is_forgotten_once_it_has(ours, start, monkeypatch):
    source = start("a-0")
    transfer = begin(ours, source)
    monkeypatch.setattr(ours.agent, "release_xfer_handle", lambda handle: 1 / 0)
    ours.cancel(transfer)
    ours.forget(["a"])
    ours.retry_releases()
    assert known(ours, source) == [True]
    monkeypatch.undo()
    ours.retry_releases()
    assert known(ours, source) == [False]


def test_a_server_that_was_forgotten_can_be_read_again(ours, start):
    source = start("a-0")
    for _ in range(2):
        wait(ours, begin(ours, source))
        ours.forget(["a"])
    assert known(ours, source) == [False]
    wait(ours, begin(ours, source))
    assert known(ours, source) == [True]


def test_a_read_that_could_not_begin_is_not_counted(ours, start):
    address = start("a-0").address() | {"name": "nobody-0", "metadata": b"no metadata"}
    transfer = Transfer()
    with pytest.raises(TransferError):
        ours.begin(transfer, address, 1, [0], [0])
    ours.cancel(transfer)
    assert not ours.num_reads
