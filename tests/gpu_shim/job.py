"""Runs a job of tests/parity/engine_job.py on the fake GPU, and prints what its steps ran in a line of its own.

The line starts with STEPS_OF: a list with, for each batch of prompts, its steps (worker.py). The job fails where a step
was the first to launch a kernel of Starling's, which would wait for its compilation.
"""

from __future__ import annotations

import json
import sys

STEPS_OF = "starling-steps: "


def main() -> None:
    from tests.gpu_shim.start import start
    from tests.gpu_shim.worker import STEPS, kernels_after_the_start
    from tests.parity import engine_job

    start()
    engine_job.leave_out_compilation()
    llm = engine_job.run_job(json.loads(sys.argv[1]))
    assert not kernels_after_the_start(), kernels_after_the_start()
    print("\n" + STEPS_OF + json.dumps(STEPS), flush=True)
    engine_job.end(llm)
