"""Runs engine jobs one after the other, each in a fork of a process that has imported vLLM.

The imports take most of the start of a tiny engine. A line of standard input is a request in JSON: {"job": what
engine_job.py runs, "env": further environment of the fork, "log": path for its output, "seconds": its time limit}. The
reply is a line of standard output, the exit code of the fork. The server ends at the end of its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from tests.parity import engine_job


def become(request: dict) -> None:
    """In the fork: take the job's environment, output and time limit."""
    os.environ.update(request["env"])
    signal.alarm(request["seconds"])
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)


def main() -> None:
    engine_job.import_vllm()
    for line in sys.stdin:
        request = json.loads(line)
        fork = os.fork()
        if not fork:
            become(request)
            engine_job.run(request["job"])
            return
        _, status = os.waitpid(fork, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
