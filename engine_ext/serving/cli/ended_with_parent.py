"""`python -m starling.engine_ext.serving.cli.ended_with_parent PID ...` is `starling ...`, which ends when PID is gone.

It is for a server that a measurement starts: a measurement that is killed can't stop its server itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from starling.engine_ext.serving.cli.main import main

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Let SIGTERM end this process once its parent is gone; only Linux supports it.

    Args:
        parent: process id of the parent. Linux watches the thread of the parent that started this process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    raise SystemExit(main(sys.argv[2:]))
