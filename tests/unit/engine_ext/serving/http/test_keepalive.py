"""TCP's keepalive of HTTP connections: vLLM's own listening socket passes it on to the connections that it accepts."""

from __future__ import annotations

import socket

from vllm.entrypoints.launchers import launcher

from starling.engine_ext.serving.cli.serve import end_lost_connections
from starling.vllm_compat.server_socket import on_server_socket


def test_accepted_connections_end_within_a_minute_of_silence(monkeypatch):
    monkeypatch.setattr(launcher, "create_server_socket", launcher.create_server_socket)  # undoes the hook
    on_server_socket(end_lost_connections)
    with launcher.create_server_socket(("127.0.0.1", 0), reuse_port=False) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, probes, user_timeout = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            )
    assert idle + interval * probes <= 60
    assert user_timeout <= 60_000
