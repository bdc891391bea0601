"""A TCP proxy on loopback that cuts connections: what a server sees of a client that vanishes within a frame."""

from __future__ import annotations

import contextlib
import socket
import threading


class CuttingProxy:
    """Forwards one connection at a time, and closes both sides once the client has sent ``limit`` bytes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.limit = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client, socket.create_connection(self.target) as server:
                back = threading.Thread(target=_copy, args=(server, client, 2**40), daemon=True)
                back.start()
                _copy(client, server, self.limit)
                for side in (client, server):
                    _shut(side)
                back.join()


def _copy(source: socket.socket, sink: socket.socket, limit: int) -> None:
    """Forward up to ``limit`` bytes, or to the end of the connection."""
    with contextlib.suppress(OSError):
        while limit and (data := source.recv(min(limit, 65536))):
            sink.sendall(data)
            limit -= len(data)


def _shut(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
