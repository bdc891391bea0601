"""The parts of the soak that need no server: the account of requests, the cut connections, the samples, the verdict."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
from contextlib import ExitStack, closing

import numpy as np
import psutil
import pytest

from benchmarks.soak.cases import PAGE_SIZE, edited, make_cases, segmented
from benchmarks.soak.ledger import ANSWERED, DIFFERENT, LEFT, Ledger
from benchmarks.soak.mix import KINDS, kinds_for
from benchmarks.soak.player import Player
from benchmarks.soak.processes import sample_folder, sample_process, sample_processes
from benchmarks.soak.relay import Cut, Relay
from benchmarks.soak.series import bound_of, report_series
from benchmarks.soak.target import PLAIN, Clients, Output, Target
from benchmarks.soak.trend import FLAT, GROWING
from benchmarks.soak.verdict import failures
from starling.client.requests import STAR

ONLY_ANSWERED = frozenset({ANSWERED})


def test_each_request_is_accounted_for_and_an_unexpected_outcome_is_lost():
    ledger = Ledger()
    for outcome in (ANSWERED, "HTTP 503", "RESOURCE_EXHAUSTED"):
        ledger.record("HTTP", outcome, "", ONLY_ANSWERED)
    ledger.record("vanishes", LEFT, "", frozenset({LEFT}))
    assert (ledger.requests, ledger.lost) == (4, 0)
    ledger.record("HTTP", LEFT, "", ONLY_ANSWERED)
    ledger.record("HTTP", "HTTP 500", "a message", ONLY_ANSWERED)
    ledger.record("HTTP", DIFFERENT, "", ONLY_ANSWERED)
    assert (ledger.requests, ledger.lost, ledger.different) == (7, 3, 1)
    assert "HTTP: HTTP 500: a message" in ledger.details
    assert sum(sum(counts.values()) for counts in ledger.as_json()["outcomes"].values()) == 7


def test_an_answer_that_is_not_the_first_one_or_that_was_cut_short_is_different():
    player = Player(Clients(Target("host:1", "host:2", "model", 1, "", "", 64)))
    first = Output({0: [5, 6, 7]}, {0: "length"})
    assert player.check_named("a case", first) == ANSWERED
    assert player.check_named("a case", Output({0: [5, 6, 7]}, {0: "stop"})) == ANSWERED
    others = [
        ({0: [5, 6, 8]}, {0: "length"}),
        ({0: [5, 6, 7]}, {0: "abort"}),
        ({0: [5, 6, 7]}, {}),
        ({}, {0: "length"}),
    ]
    for tokens, finished in others:
        assert player.check_named("a case", Output(tokens, finished)) == DIFFERENT
    assert player.ledger.checked == 6
    assert len(player.ledger.differences) == 4


def test_plain_vllm_gets_only_kinds_that_need_neither_grpc_nor_options_of_starling():
    target = Target("host:1", "host:2", "model", 1, "", "", 64, front=PLAIN)
    names = {kind.name for kind in kinds_for(target)}
    assert names < {kind.name for kind in KINDS}
    assert {"HTTP", "vanishes in decode, http", "stops reading, http"} <= names
    assert not any("grpc" in name.lower() or "refused" in name for name in names)


def test_the_cases_have_every_star_option_and_the_kinds_have_names_of_their_own():
    cases = make_cases(2)
    assert len({case.name for case in cases}) == len(cases)
    used = {name.removeprefix("star_") for case in cases for name in case.star} - {"star"} | {"mode"}
    assert used == set(STAR) - {"segment_offsets"}, "which are star_segments over HTTP"
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert not any("replicas" in name for case in make_cases(1) for name in case.star)


def test_variants_of_a_prompt_differ_where_they_should():
    first, second = edited(0, "seed"), edited(1, "seed")
    changed = [index // 128 for index, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    assert changed == [1, 2]
    assert 128 % PAGE_SIZE == 0
    assert len(segmented(2, "seed")) - len(segmented(0, "seed")) == 14


class Peer:
    """A server on loopback that counts what it gets. With ``sends``, it sends without an end once it got something."""

    def __init__(self, sends: bool = True) -> None:
        self.sends = sends

    async def __aenter__(self) -> Peer:
        self.got, self.sent, self.ended = 0, 0, asyncio.get_running_loop().create_future()
        self.listener = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()

    async def serve(self, reader, writer) -> None:
        async def send() -> None:
            while self.sends:
                writer.write(b"x" * 1000)
                await writer.drain()
                self.sent += 1000

        sending = None
        try:
            while data := await reader.read(1000):
                self.got += len(data)
                sending = sending or asyncio.create_task(send())
            self.ended.set_result("FIN")
        except ConnectionResetError:
            self.ended.set_result("RST")
        finally:
            if sending:
                sending.cancel()
            writer.close()


async def through_relay(cut: Cut, send: int, sends: bool) -> tuple[Peer, int, int]:
    """The peer, the bytes that the client got, and the relay's number of cuts, once the peer's connection has ended."""
    async with Peer(sends) as peer, Relay(peer.address, cut) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"y" * send)
        got = 0
        with closing(writer):
            try:
                while data := await reader.read(1000):
                    got += len(data)
            except ConnectionResetError:
                pass
            await asyncio.wait_for(asyncio.shield(peer.ended), 300)
        return peer, got, relay.cuts


@pytest.mark.parametrize(("reset", "end"), [(False, "FIN"), (True, "RST")])
def test_a_relay_cuts_an_upload_after_its_bytes(reset, end):
    peer, _, cuts = asyncio.run(through_relay(Cut(sent=700, reset=reset), 5000, sends=False))
    assert (cuts, peer.ended.result()) == (1, end)
    assert peer.got == 700 or reset  # on a RST the kernel drops what the peer has not read


def test_a_relay_cuts_a_response_after_its_bytes():
    peer, got, cuts = asyncio.run(through_relay(Cut(received=2500), 10, sends=True))
    assert (got, cuts, peer.got) == (2500, 1, 10)


def test_a_relay_that_holds_reads_nothing_more_so_that_the_server_has_to_wait():
    async def scenario() -> tuple[int, int]:
        async with Peer() as peer, Relay(peer.address, Cut(received=2500, hold=60)) as relay:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            writer.write(b"y")
            assert len(await reader.readexactly(2500)) == 2500
            before = -1
            while before != peer.sent:
                before = peer.sent
                await asyncio.sleep(0.2)
            writer.close()
            return before, peer.ended.done()

    sent, ended = asyncio.run(scenario())
    assert sent < 20_000_000
    assert not ended


def test_a_relay_without_a_cut_ends_with_its_client():
    async def scenario() -> tuple[str, int]:
        async with Peer() as peer, Relay(peer.address, Cut()) as relay:
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            writer.write(b"y")
            await reader.readexactly(100)
            writer.close()
            return await asyncio.wait_for(peer.ended, 300), relay.cuts

    assert asyncio.run(scenario())[1] == 0


def test_samples_of_a_process_show_its_descriptors_and_its_shared_memory(tmp_path):
    process = psutil.Process()
    gc.collect()  # or what earlier tests have left open is closed between the two samples
    before = sample_process(process)
    path = f"/dev/shm/soak-test-{os.getpid()}"
    with ExitStack() as stack:
        for index in range(5):
            stack.enter_context(open(tmp_path / str(index), "w"))
        shared = stack.enter_context(open(path, "w+b"))
        stack.callback(os.remove, path)
        shared.truncate(2**20)
        stack.enter_context(mmap.mmap(shared.fileno(), 2**20))
        values, paths = sample_processes(os.getpid())
        assert sample_process(process)["descriptors"] == before["descriptors"] + 7  # mmap has one of its own
    assert path in paths
    assert values["/dev/shm, MiB"] >= 1
    assert values["processes"] >= 1
    assert 0 < before["anonymous memory"] < before["RSS"]
    assert sample_folder(tmp_path)["temporary files"] == 5


def make_samples(leak: float) -> tuple[list[float], list[dict[str, float]]]:
    noise, hours = np.random.default_rng(0).normal(0, 1, 200), np.linspace(0.1, 0.6, 200)
    samples = [
        {"worker: RSS": 600 + leak * hour + noise[index], "worker: threads": 40, "pages used": 9 * noise[index]}
        for index, hour in enumerate(hours)
    ]
    return list(hours), samples


def test_a_leaking_process_is_reported_as_growing_and_others_are_flat():
    report = report_series(*make_samples(leak=80))
    assert report["worker: RSS"]["verdict"] == GROWING
    assert report["worker: RSS"]["interval"][0] > bound_of("worker: RSS")
    assert report["worker: threads"]["verdict"] == FLAT
    assert report["pages used"]["verdict"] is None
    assert report_series(*make_samples(leak=0))["worker: RSS"]["verdict"] == FLAT


def test_a_series_that_ends_is_left_out():
    hours, samples = make_samples(leak=0)
    samples[-1] = {name: value for name, value in samples[-1].items() if name != "worker: threads"}
    assert set(report_series(hours, samples)) == {"worker: RSS", "pages used"}


CLEAN = {
    "requests": Ledger().as_json(),
    "left_after_a_rest": {"pages_used": 0},
    "series": report_series(*make_samples(leak=0)),
    "processes_ended": 0,
    "exit_code": 0,
    "files_left": [],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requests": CLEAN["requests"] | {"lost": 1, "sent": 5, "details": ["why"]}}, "1 of 5 requests are lost: why"),
        (
            {"requests": CLEAN["requests"] | {"answers_different": 2, "answers_checked": 9, "differences": ["which"]}},
            "2 of 9 answers differ: which",
        ),
        ({"left_after_a_rest": {"pages_used": 3}}, "pages_used was 3 while no request was open"),
        ({"series": report_series(*make_samples(leak=80))}, "worker: RSS grows by"),
        ({"processes_ended": 1}, "1 processes of the server ended"),
        ({"exit_code": -9}, "exit code -9"),
        ({"files_left": ["/dev/shm/psm_1"]}, "files stayed behind: /dev/shm/psm_1"),
    ],
)
def test_each_failure_has_its_sentence(change, words):
    assert failures(CLEAN) == []
    (sentence,) = failures(CLEAN | change)
    assert words in sentence
