"""The parts of the soak that need no server: the account of requests, the cut connections, the samples, the verdict."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import psutil
import pytest

from benchmarks.random_llama import byte_tokenizer
from benchmarks.report import saved_figure
from benchmarks.soak import figure, hostile
from benchmarks.soak.__main__ import counts, parse_arguments
from benchmarks.soak.cases import PAGE_SIZE, SEGMENT_TEXT, SEGMENT_TOKEN, edited, make_cases, segmented, spread_of
from benchmarks.soak.ledger import ANSWERED, DIFFERENT, LEFT, REFUSED, Ledger
from benchmarks.soak.machine import HIGHEST_PRIORITY, MachineWatch, Pause
from benchmarks.soak.mix import KINDS, kinds_for
from benchmarks.soak.player import Player
from benchmarks.soak.processes import sample_folder, sample_process, sample_processes
from benchmarks.soak.relay import Cut, Relay
from benchmarks.soak.run import faults
from benchmarks.soak.series import LONGEST_STALL, STALLS, bound_of, report_series, stalls_in, stalls_of
from benchmarks.soak.target import PLAIN, Clients, Output, Target
from benchmarks.soak.trend import FLAT, GROWING
from benchmarks.soak.verdict import failures
from starling.client.requests import STAR
from starling.engine_ext.serving.grpc.limits import MAX_REQUEST_BYTES
from starling.v1 import inference_pb2 as pb
from tests.e2e.wait import wait_until

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


def test_prompts_are_split_over_the_peers_of_a_server_and_their_kv_does_not_stay_there():
    split = [case for case in make_cases(1, peers=2) if "star_replicas" in case.star]
    assert {case.star["star_replicas"] for case in split} == {"auto"}
    assert len(split) == 4
    assert not any("star_shards" in case.star for case in split)
    assert spread_of(3)["star_replicas"] == 3


def test_the_text_that_starts_documents_is_the_token_of_their_prompts():
    assert byte_tokenizer().encode(SEGMENT_TEXT) == [SEGMENT_TOKEN]


@pytest.mark.parametrize("field", hostile.FIELDS)
def test_the_message_of_each_field_is_as_large_as_the_server_takes(field):
    size = len(hostile.message(field))
    assert size <= MAX_REQUEST_BYTES
    assert size > MAX_REQUEST_BYTES / 2


def test_messages_have_each_field_that_can_be_large():
    request = pb.GenerateStreamRequest.DESCRIPTOR
    messages = [request, pb.SamplingParams.DESCRIPTOR, pb.StarOptions.DESCRIPTOR, pb.StructuredOutputs.DESCRIPTOR]
    fields = [field for message in messages for field in message.fields]
    large = {each.name for each in fields if each.is_repeated or each.type in (each.TYPE_STRING, each.TYPE_MESSAGE)}
    prompts = {"text", "token_ids", "texts", "chat"}  # "prompt ..." in FIELDS
    inner = {"sampling", "star", "structured_outputs"}
    assert large - prompts - inner == {name for name in hostile.FIELDS if not name.startswith("prompt")}
    assert sum(name.startswith("prompt") for name in hostile.FIELDS) == len(prompts)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("INVALID_ARGUMENT", REFUSED),
        ("OK", ANSWERED),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"),
        ("INTERNAL", "an attack: INTERNAL"),
        ("a message of 99 bytes", "an attack: a message of 99 bytes"),
    ],
)
def test_an_attack_with_another_status_than_its_own_is_lost(status, outcome):
    async def attack(player: Player) -> str:
        return status

    allowed = frozenset({"INVALID_ARGUMENT", "OK"})
    player = Player(Clients(Target("host:1", "host:2", "model", 1, "", "", 64)))
    assert asyncio.run(hostile.hostile(player, hostile.Hostile("an attack", attack, allowed))) == outcome
    (kind,) = [kind for kind in KINDS if kind.name == "hostile"]
    player.ledger.record(kind.name, outcome, "", kind.accepts)
    assert player.ledger.lost == outcome.startswith("an attack")


def test_faults_are_the_requests_of_clients_that_misbehave():
    ledger = Ledger()
    for name in ("HTTP", "HTTP", "hostile", "refused, grpc", "vanishes unstreamed, http", "stops reading, grpc"):
        ledger.record(name, ANSWERED, "", ONLY_ANSWERED)
    assert faults(ledger) == 4


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


def test_a_relay_that_is_cut_and_holds_passes_nothing_on_and_stays_connected():
    async def scenario() -> tuple[int, bool]:
        async with Peer(sends=False) as peer, Relay(peer.address, Cut(sent=700, hold=60)) as relay:
            _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            writer.write(b"y" * 700)
            while not relay.cuts or peer.got < 700:
                await asyncio.sleep(0.01)
            writer.write(b"y" * 5000)
            await asyncio.sleep(0.3)
            before, ended = peer.got, peer.ended.done()
            writer.close()
            return before, ended

    assert asyncio.run(scenario()) == (700, False)


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


WATCHED = """# TYPE starling:event_loop_stalls_total counter
starling:event_loop_stalls_total {stalls}
# TYPE starling:event_loop_longest_stall_seconds gauge
starling:event_loop_longest_stall_seconds {longest}
"""


def test_the_stalls_of_an_event_loop_are_those_of_its_watchdog():
    assert stalls_of("# TYPE vllm:requests counter\nvllm:requests 1\n") == {}
    first = stalls_of(WATCHED.format(stalls="1.0", longest="0.25"))
    assert first == {STALLS: 1, LONGEST_STALL: 250}
    two = 'starling:event_loop_stalls_total{process="0"} 1.0\nstarling:event_loop_stalls_total{process="1"} 2.0\n'
    assert stalls_of(two) == {STALLS: 3, LONGEST_STALL: 0}
    last = stalls_of(WATCHED.format(stalls="4.0", longest="1.5"))
    assert stalls_in([first, last]) == {"stalls": 3, "stalls_of_the_machine": 0, "longest_ms": 1500}
    none = {"stalls": 0, "stalls_of_the_machine": 0, "longest_ms": 0}
    assert stalls_in([first, first]) == none, "what came before is not of the load"
    assert stalls_in([first, first, last], [True, False, True]) == none | {"stalls_of_the_machine": 3}
    assert stalls_in([first, last, last], [True, False, True]) == none | {"stalls": 3, "longest_ms": 1500}
    assert stalls_in([{}, first]) is None
    assert stalls_in([]) is None


def test_a_request_that_the_machine_has_delayed_is_counted_apart_unless_its_answer_is_wrong():
    ledger = Ledger([Pause(100, 100.5), Pause(200, 236)])
    for start, end, outcome in ((90, 110, "reset"), (190, 201, "reset"), (240, 250, "reset"), (247, 260, "reset")):
        ledger.record("HTTP", outcome, f"at {start}", ONLY_ANSWERED, start, end)
    ledger.record("HTTP", DIFFERENT, "wrong", ONLY_ANSWERED, 200, 210)
    assert ledger.lost == 3
    assert ledger.details == ["HTTP: reset: at 90", "HTTP: reset: at 247", f"HTTP: {DIFFERENT}: wrong"]
    found = ledger.as_json()
    assert found["lost_while_the_machine_stood_still"] == 2
    assert found["details_while_the_machine_stood_still"] == ["HTTP: reset: at 190", "HTTP: reset: at 240"]


def test_a_processor_that_does_not_run_is_noticed():
    """One of the watching processes is stopped, as the host of a virtual machine stops a processor."""
    with MachineWatch() as machine:
        (watching, *_) = machine.processes
        if not can_have_priority():
            watching.wait()
            return
        assert wait_until(lambda: psutil.Process(watching.pid).nice() == HIGHEST_PRIORITY)
        watching.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        watching.send_signal(signal.SIGCONT)
        assert wait_until(lambda: any(pause.seconds > 1 for pause in machine.pauses))
    assert not any(process.poll() is None for process in machine.processes)


def can_have_priority() -> bool:
    script = f"import os; os.nice({HIGHEST_PRIORITY})"
    return not subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode


def test_a_short_run_has_no_verdict_of_its_growth():
    report = report_series(*make_samples(leak=80), judged=False)
    assert {series["verdict"] for series in report.values()} == {None}
    assert report["worker: RSS"]["bound"] == bound_of("worker: RSS")


CLEAN = {
    "requests": Ledger().as_json(),
    "left_after_a_rest": {"pages_used": 0},
    "series": report_series(*make_samples(leak=0)),
    "event_loops": {"one engine": None, "peer 1": {"stalls": 0, "longest_ms": 0}},
    "split_blocks": {"peer 1": 90},
    "machine_stood_still": [],
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
        (
            {"event_loops": {"peer 1": {"stalls": 2, "longest_ms": 412.5}, "peer 2": None}},
            "the event loop of peer 1 stood still 2 times, for up to 412.5 ms",
        ),
        ({"split_blocks": {"peer 1": 90, "peer 2": 0}}, "peer 2 split no prompt"),
        ({"processes_ended": 1}, "1 processes of the server ended"),
        ({"exit_code": -9}, "exit code -9"),
        ({"files_left": ["/dev/shm/psm_1"]}, "files stayed behind: /dev/shm/psm_1"),
    ],
)
def test_each_failure_has_its_sentence(change, words):
    assert failures(CLEAN) == []
    (sentence,) = failures(CLEAN | change)
    assert words in sentence


def test_the_line_of_counts_has_requests_faults_losses_leaks_and_the_longest_stall():
    run = CLEAN | {"requests": CLEAN["requests"] | {"sent": 90, "lost": 1}, "faults": 20, "pages_leaked": 3}
    expected = "90 requests, 20 of them faults; lost: 1; pages leaked: 3; longest stall of an event loop: "
    never = "; the machine stood still 0 times, 0 s in all, and 0 requests were lost by that"
    assert counts(run) == f"{expected}none above 200 ms{never}"
    stalled = run | {"event_loops": {"one engine": {"stalls": 1, "longest_ms": 412.5}}}
    assert counts(stalled) == f"{expected}412.5 ms{never}"
    assert counts(run | {"event_loops": {"one engine": None}}) == f"{expected}not measured{never}"
    still = run | {"machine_stood_still": [36.5, 1.5]}
    still["requests"] = run["requests"] | {"lost_while_the_machine_stood_still": 8}
    assert counts(still).endswith("; the machine stood still 2 times, 38 s in all, and 8 requests were lost by that")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "1"], "--minutes 1 is refused"),
        (["--replicas", "0"], "--replicas 0 is refused"),
        (["--peers", "1"], "--peers 1 is refused"),
        (["--peers", "2", "--front", "plain"], "--peers 2 is refused"),
    ],
)
def test_arguments_that_make_no_soak_are_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["soak", *arguments])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert words in capsys.readouterr().err


def test_the_figure_has_a_column_for_each_run_and_a_panel_of_stalls(tmp_path, monkeypatch):
    panels = []

    @contextmanager
    def kept(path, *arguments, **options):
        with saved_figure(path, *arguments, **options) as (made, axes):
            yield made, axes
            panels.append([[panel.get_legend_handles_labels()[1] for panel in row] for row in axes])

    monkeypatch.setattr(figure, "saved_figure", kept)
    names = ("front: RSS", "front: descriptors", "front: threads", "pages used", "pages cached", "requests running")
    plain = {"series": {name: {"curve": [1.0, 2.0]} for name in names}, "minutes": 4, "rate_requests_per_second": 1.0}
    plain |= {"requests": {"sent": 5, "lost": 0}, "front": "starling", "replicas": 1, "peers": 0}
    watched = {f"peer {number}: {name}": {"curve": [1.0, 2.0]} for number in (1, 2) for name in (*names, LONGEST_STALL)}
    figure.draw([plain, plain | {"series": watched, "peers": 2}], tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    (rows,) = panels
    assert rows[0] == [["front"], ["peer 1: front", "peer 2: front"]]
    assert rows[3][1] == [f"peer {number}: {name}" for number in (1, 2) for name in names[3:]]
    assert rows[4] == [[], [f"peer {number}: {LONGEST_STALL}" for number in (1, 2)]]
