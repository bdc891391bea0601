"""TCP's options for connections whose client vanishes without closing them. uvicorn has no option for it."""

from __future__ import annotations

import socket

IDLE_SECONDS, INTERVAL_SECONDS, PROBES = 20, 10, 2


def end_lost_connections(listener: socket.socket) -> None:
    """Let connections that a socket accepts end, and with them their requests, 40 s after the client has vanished.

    Nothing is sent during a prefill, so the kernel sends probes. If data is under way, it is acknowledged in that time.
    """
    seconds = IDLE_SECONDS + INTERVAL_SECONDS * PROBES
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000),
    ):
        listener.setsockopt(level, option, value)
