"""Test only: in every process that has this folder on PYTHONPATH, vLLM forks its processes instead of spawning them.

vLLM has both ways, and spawns on CPU. Each engine core and each worker then imports vLLM again, which takes most of the
start of a tiny model. The fixture `forked` of tests/e2e uses this folder. What a fork would take over from its parent,
and a spawned process has not, is put right: sockets and signals, the pipe that tells of an end, and where metrics are
counted.
"""

import multiprocessing
import os
import signal
import socket
import stat
import sys
from multiprocessing import popen_fork
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from amend_imports import amend

sys.path.pop()


def _fork(system_utils):
    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    popen_fork.Popen = _Popen
    os.register_at_fork(after_in_child=_leave_parent)


class _Popen(popen_fork.Popen):
    """Its sentinel is of the process alone: a pipe to it would also wait for the end of the processes it forks."""

    def _launch(self, process):
        super()._launch(process)
        self.sentinel = os.pidfd_open(self.pid)


def _leave_parent():
    """Signals no longer reach the parent's event loop, and /dev/null is in the place of its sockets.

    Except pairs: these have no name, and multiprocessing uses them as pipes.
    """
    signal.set_wakeup_fd(-1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if _is_socket(fd):
            with socket.socket(fileno=os.dup(fd)) as copy:
                if copy.getsockname():
                    os.dup2(null, fd)
    os.close(null)


def _is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # that of the folder, which is closed
        return False


def _count_in_files(values):
    """prometheus_client decides it at import, which a spawned process does where vLLM has set its variable."""

    def decide():
        if not values.ValueClass._multiprocess:
            values.ValueClass = values.get_value_class()

    os.register_at_fork(after_in_child=decide)


def _inspect_here(registry):
    """A process that imports vLLM to look at a model's class keeps CUDA out of this one, which has none."""
    registry._run_in_subprocess = lambda look: look()


amend("vllm.utils.system_utils", _fork)
amend("vllm.model_executor.models.registry", _inspect_here)
amend("prometheus_client.values", _count_in_files)
