"""Random sequences of requests, steps and faults on the real scheduler: nothing is lost, leaked or read wrongly."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from tests.stateful import Length, run_machine
from tests.unit.scheduler.simulation import make_config
from tests.unit.scheduler.stateful.machine import SchedulerMachine
from tests.unit.scheduler.stateful.setup import KINDS


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("models"), block_size=8)


@pytest.fixture
def quiet():
    """vLLM logs each pause, each reset, and each token that a grammar rejects."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_lost_no_page_leaks_and_none_is_read_wrongly(config, quiet, pytestconfig, kind):
    machine = type("SchedulerMachine", (SchedulerMachine,), {"config": config, "kind": kind, "totals": Counter()})
    run_machine(machine, Length.of(pytestconfig), runs=40, rules=40)
