"""Lifetime of HTTP connections: without a request, and after their client has vanished."""

from __future__ import annotations

import socket

KEEP_ALIVE_ENV, KEEP_ALIVE_SECONDS = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", 75
"""Environment variable of vLLM for the seconds that a connection without a request stays open, and its default here.

With vLLM's default of 5 s, requests are lost. Clients and gateways keep connections for 5 to 60 s, and send a request
on one that the server closes at that moment. And after a moment in which the front did not run, its event loop closes
connections whose time is over before it reads the requests that have arrived on them.
"""

IDLE_SECONDS, INTERVAL_SECONDS, PROBES = 20, 10, 2


def end_lost_connections(listener: socket.socket) -> None:
    """Let connections that a socket accepts, and their requests, end 40 s after the client has vanished.

    uvicorn has no option for it. Nothing is sent during a prefill, so the kernel sends probes. Data that is being sent
    must be acknowledged in that time.
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
