"""Runs the Python file that the argument names as a program, in a fork (tests/forks.py)."""

import runpy
import sys

from tests.parity.engine_job import leave_out_compilation


def main() -> None:
    leave_out_compilation()
    runpy.run_path(sys.argv[1], run_name="__main__")
