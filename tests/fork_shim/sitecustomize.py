"""Test only: in every process that has this folder on PYTHONPATH, vLLM forks its processes instead of spawning them.

vLLM has both ways, and spawns on CPU. Each engine core and each worker then imports vLLM again, which takes most of the
start of a tiny model. The fixture `forked` of tests/e2e uses this folder.
"""

import multiprocessing
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from amend_imports import amend

sys.path.pop()


def _fork(system_utils):
    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


amend("vllm.utils.system_utils", _fork)
