"""docs/faults.md is made from the results of the fault matrix; and what a server of the matrix sees of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from examples.two_hosts import available
from tests.faults.page import PAGE, page
from tests.faults.place import FOLDERS, needed, place, shown_below
from tests.faults.run import RESULTS
from tests.faults.table import cells


def test_the_committed_page_is_that_of_the_committed_results():
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results), "run `make faults`"


def test_each_result_is_that_of_a_cell_of_the_table():
    assert set(json.loads(RESULTS.read_text())) <= {cell.name for cell in cells()}


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
