"""The sockets of a server."""

from __future__ import annotations

import psutil

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening(pid: int) -> set[tuple[str, str]]:
    """(process name, address) of each socket on which a process or one of its descendants listens."""
    root = psutil.Process(pid)
    return {
        (process.name(), socket.laddr.ip)
        for process in [root, *root.children(recursive=True)]
        for socket in process.net_connections(kind="inet")
        if socket.status == psutil.CONN_LISTEN
    }
