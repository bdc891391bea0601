"""Random sequences of requests, steps and faults on the real scheduler: nothing is lost, leaked or read wrongly."""

from __future__ import annotations

import logging

import pytest

from tests.stateful import Length, run_machine
from tests.unit.scheduler.simulation import make_config
from tests.unit.scheduler.stateful.machine import SchedulerMachine


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("models"), block_size=8)


@pytest.fixture
def quiet():
    """vLLM logs each pause, each reset, and each token that a grammar rejects."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def test_no_request_is_lost_no_page_leaks_and_none_is_read_wrongly(config, quiet, pytestconfig):
    SchedulerMachine.config = config
    run_machine(SchedulerMachine, Length.of(pytestconfig), runs=150, rules=40)
