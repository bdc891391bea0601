"""Test only: in every process of a server, a page transfer that waits at a gate, and a wall clock that can be moved.

FAULTS_GATE names a folder. While it has the file `gate-shut`, a transfer of pages that begins makes the file
`gate-reached` and waits. FAULTS_CLOCK names a file with the seconds by which time.time() is ahead.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

GATE, CLOCK = os.environ.get("FAULTS_GATE"), os.environ.get("FAULTS_CLOCK")


class _AddGate(importlib.abc.MetaPathFinder):
    """Amends replicas.page_transfer once it has been imported, so that nothing is imported before its time."""

    def find_spec(self, name, path=None, target=None):
        if name != "replicas.page_transfer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            begin = module.PageReader.begin

            def wait_at_gate(self, *args):
                gate = Path(GATE)
                while (gate / "gate-shut").exists():
                    (gate / "gate-reached").touch()
                    time.sleep(0.01)
                begin(self, *args)

            module.PageReader.begin = wait_at_gate

        spec.loader.exec_module = exec_module
        return spec


def _ahead():
    try:
        return float(Path(CLOCK).read_text() or 0)
    except OSError:
        return 0.0


if GATE:
    sys.meta_path.insert(0, _AddGate())
if CLOCK:
    _now = time.time
    time.time = lambda: _now() + _ahead()
