"""docs/faults.md is made from the results of the fault matrix; and what a server of the matrix sees of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest

from examples.two_hosts import available
from tests.faults.clients import CLIENTS
from tests.faults.page import PAGE, page
from tests.faults.place import FOLDERS, needed, place, shown_below
from tests.faults.run import RESULTS
from tests.faults.run_cell import Result
from tests.faults.table import cells


def test_the_committed_page_is_that_of_the_committed_results():
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results), "run `make faults`"


def test_each_result_is_that_of_a_cell_of_the_table():
    assert set(json.loads(RESULTS.read_text())) <= {cell.name for cell in cells()}


def result(**fields: object) -> dict:
    """Of a cell in which each client got the whole answer, but for these fields."""
    ends = dict.fromkeys(CLIENTS, "answer")
    return asdict(Result(ends=ends, http_health=["200"], grpc_health=["SERVING"], seconds=2.5)) | fields


def test_the_page_says_what_differed():
    first, second, *_ = cells()
    ends = dict.fromkeys(CLIENTS, "answer") | {"gRPC": "silence"}
    text = page({first.name: result(), second.name: result(ends=ends, faults=["gRPC: silence", "left: 3 | pages"])})
    assert " cells 2 were run. In 1 of them all was as expected" in text
    of_second = f"| {second.server} | {second.fault} | {second.target} | {second.moment} |"
    assert (
        f"The others:\n\n| server | fault | of | moment | what differs |\n| --- | --- | --- | --- | --- |\n{of_second}"
        in text
    )
    assert f"{of_second} gRPC: silence; left: 3 \\| pages |\n" in text


def test_the_page_has_the_worst_that_a_client_saw_at_each_moment():
    found = [cell for cell in cells() if (cell.fault, cell.target) in {("SIGKILL", "engine"), ("SIGKILL", "replica 0")}]
    results = {cell.name: result() for cell in found}
    results["one engine / SIGKILL / engine / prefill"]["ends"] |= {"HTTP": "error (500)", "gRPC": "aborted"}
    results["shards / SIGKILL / replica 0 / decode"]["ends"] = dict.fromkeys(CLIENTS, "aborted")
    cells_of_row = "|  | answer | error; shards: answer | answer | answer; shards: aborted |"
    assert f"| SIGKILL | engine or worker {cells_of_row}" in page(results)


def test_targets_that_clients_see_alike_share_a_row():
    found = [cell for cell in cells() if cell.fault == "SIGKILL" and cell.target in ("API server", "coordinator")]
    found = [cell for cell in found if cell.server == "replicas"]
    text = page({cell.name: result(seconds=3.0 + number) for number, cell in enumerate(found)})
    assert "| SIGKILL | API server, coordinator |  | answer | answer | answer | answer |" in text
    assert f"Every\nrequest ended within {2 + len(found)} s." in text


@pytest.mark.skipif(not available(), reason="needs root and namespaces")
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_server_sees_what_it_reads_wherever_that_lies_and_nothing_else_of_tmp(folder):
    """The folder `checkout` stands for a checkout below /tmp. What is left beside it is found, and no file in it is."""
    with tempfile.TemporaryDirectory(dir=folder) as made, tempfile.NamedTemporaryFile(dir=folder) as other:
        checkout = Path(made) / "a checkout"
        checkout.mkdir()
        (checkout / "read").write_text("its text")
        with place(shown=[checkout]) as here:

            def run(script: str) -> str:
                command = [*here.prefix({}), "sh", "-c", script, "sh", checkout, other.name, folder]
                return subprocess.run(command, check=True, capture_output=True, text=True).stdout

            assert run('cat "$1/read"; test ! -e "$2"; : > "$3/empty"; echo left > "$3/left"') == "its text"
            assert here.files() == [f"{folder}/left"]
            here.fill(folder)
            with pytest.raises(OSError, match="No space left"):
                here.path(f"{folder}/more").write_text("more")
            here.unfill(folder)
            run('echo written > "$1/written"')
        assert (checkout / "written").read_text() == "written\n"
        assert not Path(folder, "left").exists()


def test_a_server_needs_the_checkout_and_the_environment_by_each_of_their_names(tmp_path, monkeypatch):
    link, real = tmp_path / "link", tmp_path / "real"
    real.mkdir()
    link.symlink_to(real)
    monkeypatch.setattr(sys, "prefix", str(link))
    assert {Path(__file__).resolve().parents[3], link, real} <= needed()
    assert link in shown_below(str(tmp_path), needed())


def test_of_folders_in_one_another_the_outermost_is_shown():
    paths = [Path("/tmp/a/b"), Path("/tmp/a"), Path("/tmp/ab"), Path("/tmp"), Path("/home/tmp/a")]
    assert shown_below("/tmp", paths) == [Path("/tmp/a"), Path("/tmp/ab")]
