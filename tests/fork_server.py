"""Runs jobs one after the other, each in a fork of a process that has imported what the jobs need.

    python -m tests.fork_server NAME...

Each NAME is imported first: a module, or module:attribute. Importing vLLM takes most of the time of a short job. A line
of standard input is a request in JSON: {"function": module:function, whose result is the exit code, "argv": its
arguments, "env": further environment of the fork, null for what is not set, "stdout", "stderr": paths for its output,
"seconds": its time limit}. The reply is a line of standard output, the exit code of the fork. The server ends at the
end of its standard input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Iterable


def preload(names: Iterable[str]) -> None:
    """Import what all forks need: modules, or module:attribute."""
    for name in names:
        importlib.import_module(name.partition(":")[0])  # resolve_name alone hides an ImportError in a module
        pkgutil.resolve_name(name)
    gc.collect()
    gc.freeze()  # no collection in a fork goes through all that was imported


def redirect(files: Iterable[int]) -> None:
    """Take nothing as standard input, and two files as standard output and error."""
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), *zip(files, (1, 2), strict=True)):
        os.dup2(source, target)
        os.close(source)


def become(request: dict) -> None:
    """In the fork: take the job's environment, arguments, output and time limit."""
    for name, value in request["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.argv[1:] = request["argv"]
    signal.alarm(request["seconds"])
    files = [os.open(request[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
    redirect(files)


def main() -> int | None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no reply
    preload(sys.argv[1:])
    for line in sys.stdin:
        request = json.loads(line)
        fork = os.fork()
        if not fork:
            become(request)
            return pkgutil.resolve_name(request["function"])()
        _, status = os.waitpid(fork, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
