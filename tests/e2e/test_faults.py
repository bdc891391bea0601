"""Three cells of the fault matrix on one server. `make faults` runs all of them."""

from dataclasses import replace

import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.two_hosts import available
from tests.faults import run_cell, served
from tests.faults.place import place
from tests.faults.run import FOLDER
from tests.faults.table import DECODE, PREFILL, Cell, expected

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not available(), reason="needs root and namespaces")]


@pytest.fixture(scope="module")
def server():
    model = make_tiny_llama(FOLDER / "tiny")
    with place() as here, served.served(here, model, log=FOLDER / "e2e.log") as server:
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A slow machine is no failure here. `make faults` has limits of time, for a machine without other work."""
    monkeypatch.setattr(served, "SILENCE_SECONDS", 300)
    for name in ("MOMENT_SECONDS", "EXIT_SECONDS", "GONE_SECONDS", "RELEASE_SECONDS"):
        monkeypatch.setattr(run_cell, name, 300)


@pytest.mark.parametrize(
    ("fault", "target", "moment"),
    [("SIGSTOP, 2 s", "engine", DECODE), ("SIGSTOP, 2 s", "worker", PREFILL), ("SIGKILL", "engine", DECODE)],
    ids=["engine stands during the outputs", "worker stands during the prefill", "engine is killed during the outputs"],
)
def test_clients_see_what_is_expected_and_nothing_is_left(server, fault, target, moment):
    """The last case ends the server."""
    wanted = replace(expected("one engine", fault, target, moment), seconds=300)
    result = run_cell.run_cell(server, Cell("one engine", fault, target, moment, wanted))
    assert not result.faults, result
