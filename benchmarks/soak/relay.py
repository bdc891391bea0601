"""A port of loopback whose connections lead to a server, until the relay cuts them: clients that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass

READ_BYTES = 4096
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with 0 seconds: close() sends RST


@dataclass(frozen=True)
class Cut:
    """End of a connection, at the first of three events.

    Attributes:
        seconds: time after the start of the connection.
        sent: bytes from the client to the server.
        received: bytes from the server to the client.
        hold: seconds during which the connection stays open after that, and nothing is read from it or sent.
        reset: True if the server gets a RST; otherwise it gets a FIN.
    """

    seconds: float = 60
    sent: int = 2**62
    received: int = 2**62
    hold: float = 0
    reset: bool = False


class Relay:
    """Listens on a free port for the duration of the block.

    Attributes:
        port: port on which it listens.
        cuts: connections that it has ended before the client or the server did.
    """

    def __init__(self, address: str, cut: Cut) -> None:
        """Prepare the relay; it does not listen yet.

        Args:
            address: host:port of the server.
            cut: end of each connection.
        """
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self.cut = cut
        self.cuts = 0

    async def __aenter__(self) -> Relay:
        self.listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=READ_BYTES)
        self.port = self.listener.sockets[0].getsockname()[1]
        self.tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = socket.create_connection(self.address)
        # Few bytes wait between the server and a client that does not read.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
        far_reader, far_writer = await asyncio.open_connection(sock=server, limit=READ_BYTES)
        forwards = [
            asyncio.create_task(forward(reader, far_writer, self.cut.sent)),
            asyncio.create_task(forward(far_reader, writer, self.cut.received)),
            asyncio.create_task(asyncio.sleep(self.cut.seconds, True)),
        ]
        try:
            done, _ = await asyncio.wait(forwards, return_when=asyncio.FIRST_COMPLETED)
            if any(task.result() for task in done):
                self.cuts += 1
                for each in forwards:
                    each.cancel()
                await asyncio.sleep(self.cut.hold)
        finally:
            for each in forwards:
                each.cancel()
            if self.cut.reset and server.fileno() != -1:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            far_writer.transport.abort()
            writer.transport.abort()


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> bool:
    """Pass bytes on until the end or up to ``limit`` bytes; returns whether the limit was the reason."""
    left = limit
    with contextlib.suppress(ConnectionError):
        while left and (data := await reader.read(min(left, READ_BYTES))):
            left -= len(data)
            writer.write(data)
            await writer.drain()
    return not left
