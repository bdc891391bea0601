"""Three cells of the fault matrix on one server. `make faults` runs all of them."""

import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import end_on_signals
from examples.two_hosts import available
from tests.faults.place import place
from tests.faults.run import FOLDER
from tests.faults.run_cell import run_cell
from tests.faults.served import served
from tests.faults.table import DECODE, PREFILL, Cell, expected

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not available(), reason="needs root and namespaces")]


@pytest.fixture(scope="module")
def server():
    end_on_signals()
    model = make_tiny_llama(FOLDER / "tiny")
    with place() as here, served(here, model, log=FOLDER / "e2e.log") as server:
        yield server


@pytest.mark.parametrize(
    ("fault", "target", "moment"),
    [("SIGSTOP, 2 s", "engine", DECODE), ("SIGSTOP, 2 s", "worker", PREFILL), ("SIGKILL", "engine", DECODE)],
    ids=["engine stands during the outputs", "worker stands during the prefill", "engine is killed during the outputs"],
)
def test_clients_see_what_is_expected_and_nothing_is_left(server, fault, target, moment):
    """The last case ends the server."""
    cell = Cell("one engine", fault, target, moment, expected("one engine", fault, target, moment))
    result = run_cell(server, cell)
    assert not result.faults, result
