"""A client of HTTP/2 frames (RFC 9113), for calls that gRPC's own client can't make: parts of messages, and silence."""

from __future__ import annotations

import asyncio
import ssl
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_HEADERS = 1, 4
MAX_FRAME = 16384
WINDOW = 65535
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW = 3, 4  # settings


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def prefix(size: int, compressed: bool = False) -> bytes:
    """gRPC's prefix of a message of ``size`` bytes."""
    return bytes([compressed]) + struct.pack(">I", size)


def header(name: str, value: str) -> bytes:
    """A header field without compression (RFC 7541, 6.2.2); name and value are shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Connection:
    """A connection. It answers settings and pings by itself, and keeps to the windows that the server opens.

    Attributes:
        ended: streams that the server has ended, or reset.
        settings: of the server.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.window = WINDOW
        self.initial = WINDOW
        self.windows: dict[int, int] = {}
        self.ended: set[int] = set()
        self.settings: dict[int, int] = {}
        self.closed = False
        self.changed = asyncio.Condition()
        self.streams = iter(range(1, 10**6, 2))
        writer.write(PREFACE + frame(SETTINGS, 0, 0))
        self.reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, address: str, context: ssl.SSLContext | None = None) -> Connection:
        host, port = address.rsplit(":", 1)
        name = "localhost" if context else None  # the certificate's
        connection = cls(*await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name))
        await connection.until(lambda: connection.settings)
        return connection

    async def close(self) -> None:
        self.reading.cancel()
        self.writer.close()

    async def until(self, condition) -> None:
        """Wait until the condition holds."""
        async with asyncio.timeout(300), self.changed:
            await self.changed.wait_for(condition)

    def call(self, path: str, **metadata: str) -> int:
        """Start a call, and return its stream."""
        stream = next(self.streams)
        self.windows[stream] = self.initial
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost", "te": "trailers"}
        fields |= {"content-type": "application/grpc"} | {key.replace("_", "-"): metadata[key] for key in metadata}
        block = b"".join(header(name, value) for name, value in fields.items())
        self.writer.write(frame(HEADERS, END_HEADERS, stream, block))
        return stream

    async def send(self, stream: int, data: bytes) -> None:
        """Send bytes of a stream, as the windows allow; returns early where the server ends the stream."""
        while data:
            await self.until(lambda: stream in self.ended or min(self.window, self.windows[stream]) > 0)
            if stream in self.ended:
                return
            size = min(len(data), self.window, self.windows[stream], MAX_FRAME)
            self.writer.write(frame(DATA, 0, stream, data[:size]))
            self.window -= size
            self.windows[stream] -= size
            data = data[size:]

    async def _read(self) -> None:
        try:
            while True:
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
                async with self.changed:
                    self._handle(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                    self.changed.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            async with self.changed:
                self.closed = True
                self.changed.notify_all()

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self.settings |= dict(struct.iter_unpack(">HI", payload))
            gain = self.settings.get(INITIAL_WINDOW, self.initial) - self.initial
            self.initial += gain
            self.windows = {name: window + gain for name, window in self.windows.items()}
            self.writer.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.writer.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and stream == 0:
            self.window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE:
            self.windows[stream] = self.windows.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind == RST_STREAM or (kind == HEADERS and flags & 1):
            self.ended.add(stream)
