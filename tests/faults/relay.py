"""`python relay.py SOCKET PORT`: passes connections to a Unix socket on to a port of loopback.

Run in a network namespace, it lets a client outside of it reach a server there.
"""

import asyncio
import contextlib
import sys


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def relay(socket: str, port: int) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, to[1]), copy(to[0], writer))

    async with await asyncio.start_unix_server(connect, socket) as server:
        await server.serve_forever()


asyncio.run(relay(sys.argv[1], int(sys.argv[2])))
