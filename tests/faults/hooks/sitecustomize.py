"""Test only: in every process of a server, a page transfer that waits at a gate, and a wall clock that can be moved.

FAULTS_GATE names a folder. While it has the file `gate-shut`, a transfer of pages that begins makes the file
`gate-reached` and waits. FAULTS_CLOCK names a file with the seconds by which time.time() is ahead.
"""

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from amend_imports import amend

sys.path.pop()

GATE, CLOCK = os.environ.get("FAULTS_GATE"), os.environ.get("FAULTS_CLOCK")


def _add_gate(page_transfer):
    begin = page_transfer.PageReader.begin

    def wait_at_gate(self, *args):
        gate = Path(GATE)
        while (gate / "gate-shut").exists():
            (gate / "gate-reached").touch()
            time.sleep(0.01)
        begin(self, *args)

    page_transfer.PageReader.begin = wait_at_gate


def _ahead():
    try:
        return float(Path(CLOCK).read_text() or 0)
    except OSError:
        return 0.0


if GATE:
    amend("starling.features.replicas.page_transfer", _add_gate)
if CLOCK:
    _now = time.time
    time.time = lambda: _now() + _ahead()
