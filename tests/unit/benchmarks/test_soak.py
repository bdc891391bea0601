"""The parts of the soak that need no server: the account of requests, the samples, the verdict."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
from contextlib import ExitStack

import numpy as np
import psutil
import pytest

from benchmarks.soak import hostile
from benchmarks.soak.ledger import ANSWERED, DIFFERENT, LEFT, REFUSED, Ledger
from benchmarks.soak.machine import Pause
from benchmarks.soak.mix import KINDS
from benchmarks.soak.player import Player
from benchmarks.soak.processes import sample_folder, sample_process, sample_processes
from benchmarks.soak.run import faults
from benchmarks.soak.series import LONGEST_STALL, STALLS, bound_of, report_series, stalls_in, stalls_of
from benchmarks.soak.target import Clients, Output, Target
from benchmarks.soak.trend import FLAT, GROWING
from benchmarks.soak.verdict import failures

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
    short = report_series(*make_samples(leak=80), judged=False)
    assert {series["verdict"] for series in short.values()} == {None}


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


CLEAN = {
    "requests": Ledger().as_json(),
    "left_after_a_rest": {"pages_used": 0},
    "series": report_series(*make_samples(leak=0)),
    "event_loops": {"one engine": None, "2 replicas": {"stalls": 0, "longest_ms": 0}},
    "split_blocks": {"2 replicas": 90},
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
            {"event_loops": {"2 replicas": {"stalls": 2, "longest_ms": 412.5}, "3 replicas": None}},
            "the event loop of 2 replicas stood still 2 times, for up to 412.5 ms",
        ),
        ({"split_blocks": {"2 replicas": 90, "3 replicas": 0}}, "3 replicas split no prompt"),
        ({"processes_ended": 1}, "1 processes of the server ended"),
        ({"exit_code": -9}, "exit code -9"),
        ({"files_left": ["/dev/shm/psm_1"]}, "files stayed behind: /dev/shm/psm_1"),
    ],
)
def test_each_failure_has_its_sentence(change, words):
    assert failures(CLEAN) == []
    (sentence,) = failures(CLEAN | change)
    assert words in sentence
