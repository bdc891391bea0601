"""Starts servers as forks of one process that has imported what a server needs, which takes most of its start.

    python -m tests.fork_servers NAME...

Each NAME is imported first: a module, or module:attribute. Standard input is a socket. A byte on it starts a program,
and has three file descriptors with it: a socket, and those for the program's standard output and error. On the socket
follows a line of JSON: {"function": module:function, whose result is the exit code, "argv", "env", "cwd"}. The replies
are lines: the process id, and the exit code at the end, as that of `subprocess.Popen`. When the other end of the socket
is closed, the program's process group is killed. The process ends with its standard input.
"""

from __future__ import annotations

import json
import os
import pkgutil
import selectors
import signal
import socket
import sys

import setproctitle

from tests.fork_server import preload, redirect


def become(request: dict, files: list[int]) -> None:
    """In the fork: take the program's environment, arguments, folder and output, in a process group of its own."""
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv[:] = request["argv"]
    setproctitle.setthreadtitle(os.path.basename(sys.argv[0]))  # the name of the process, as of a program of its own
    redirect(files)


def run(connection: socket.socket, files: list[int]) -> None:
    """In a fork of its own: run the program that a connection asks for, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lines = connection.makefile("rw")
    request = json.loads(lines.readline())
    function = pkgutil.resolve_name(request["function"])
    program = os.fork()
    if not program:
        lines.close()
        connection.close()
        become(request, files)
        sys.exit(function())
    with selectors.DefaultSelector() as selector:
        print(program, file=lines, flush=True)
        ended = os.pidfd_open(program)
        selector.register(ended, selectors.EVENT_READ)
        selector.register(connection, selectors.EVENT_READ)
        if all(key.fd != ended for key, _ in selector.select()):  # nobody is left to be told
            os.killpg(program, signal.SIGKILL)
            return
    _, status = os.waitpid(program, 0)
    print(os.waitstatus_to_exitcode(status), file=lines, flush=True)


def main() -> None:
    preload(sys.argv[1:])
    setproctitle.getproctitle()  # the first call finds where the title is by the environment, which forks change
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that run programs
    with socket.socket(fileno=os.dup(0)) as requests:
        while files := socket.recv_fds(requests, 1, 3)[1]:
            if not os.fork():
                run(socket.socket(fileno=files[0]), files[1:])
                os._exit(0)
            for file in files:
                os.close(file)


if __name__ == "__main__":
    main()
