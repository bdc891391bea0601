"""Runs a job of tests/parity/engine_job.py on the fake GPU, and prints what its steps ran in a line of its own.

The line starts with STEPS_OF: a list with, for each batch of prompts, its steps (worker.py).
"""

from __future__ import annotations

import json

STEPS_OF = "starling-steps: "


def main() -> None:
    from tests.gpu_shim.start import start
    from tests.gpu_shim.worker import STEPS
    from tests.parity import engine_job

    start()
    engine_job.leave_out_compilation()
    engine_job.main()
    print("\n" + STEPS_OF + json.dumps(STEPS), flush=True)
