"""Messages between engine processes over NIXL's notifications: shared memory on one host, TCP or RDMA between hosts.

A notification needs no registered memory, so an answer that comes after its asker has given up lands nowhere. Past one
fragment of UCX's they slow down (a megabyte in one takes several times as long as in frames of 16 KiB), so messages
are cut into frames. Nothing runs by itself: whoever waits for a message drives the transport by asking for it, while
with NIXL's own thread it waits for that one's next round, on both sides. Sending needs no further driving: measured,
4 MiB have gone out when ``send`` returns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

FRAME_BYTES = 16 * 1024
FRAME = struct.Struct("<QII")  # number of the message, of the frame, and how many frames there are
HEADER = struct.Struct("<I")  # its bytes


class MessageError(Exception):
    """A message can't be sent; says why."""


@dataclass(frozen=True)
class Message:
    """``header`` is what msgpack takes; ``body`` raw bytes."""

    sender: str
    header: dict[str, Any]
    body: bytearray


def frames(number: int, header: dict[str, Any], body: bytes) -> Iterator[bytes]:
    """A message as it goes out."""
    packed = msgspec.msgpack.encode(header)
    whole = HEADER.pack(len(packed)) + packed + body
    count = -(-len(whole) // FRAME_BYTES)
    for index in range(count):
        yield FRAME.pack(number, index, count) + whole[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]


class Joiner:
    """Puts frames together again, in whatever order they come."""

    def __init__(self) -> None:
        self.open: dict[tuple[str, int], dict[int, bytes]] = {}

    def add(self, sender: str, frame: bytes) -> Message | None:
        """The message that this frame was the last of."""
        number, index, count = FRAME.unpack_from(frame)
        parts = self.open.setdefault((sender, number), {})
        parts[index] = frame
        if len(parts) < count:
            return None
        del self.open[sender, number]
        whole = bytearray()
        for part in range(count):
            whole += memoryview(parts[part])[FRAME.size :]
        (size,) = HEADER.unpack_from(whole)
        header = msgspec.msgpack.decode(memoryview(whole)[HEADER.size : HEADER.size + size])
        del whole[: HEADER.size + size]
        return Message(sender, header, whole)

    def forget(self, sender: str) -> None:
        """Drop what a sender has begun."""
        for key in [key for key in self.open if key[0] == sender]:
            del self.open[key]


class Messenger:
    """One end; to be used by one thread.

    Args:
        name: unique among all of them.
    """

    def __init__(self, name: str) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.address = {"name": name, "metadata": self.agent.get_agent_metadata()}
        self.joiner = Joiner()
        self.peers: dict[str, str] = {}
        self.sent = 0

    def knows(self, name: str) -> bool:
        return name in self.peers

    def connect(self, address: dict[str, Any]) -> None:
        """Make messages to ``address`` possible (raises MessageError)."""
        try:
            self.peers[address["name"]] = self.agent.add_remote_agent(address["metadata"])
        except Exception as error:  # NIXL's own exceptions have no common class
            raise MessageError(f"NIXL can't reach {address['name']}: {error!r}") from error

    def send(self, name: str, header: dict[str, Any], body: bytes = b"") -> None:
        """Hand a message to the transport (raises MessageError)."""
        self.sent += 1
        try:
            for frame in frames(self.sent, header, body):
                self.agent.send_notif(self.peers[name], frame)
        except Exception as error:
            raise MessageError(f"NIXL can't send to {name}: {error!r}") from error

    def receive(self) -> list[Message]:
        """What has come since; never waits."""
        notes = self.agent.get_new_notifs()
        found = (self.joiner.add(sender, frame) for sender, all_of in notes.items() for frame in all_of)
        return [message for message in found if message is not None]

    def forget(self, name: str) -> None:
        """Cut the connection to a peer that does not answer; the next message makes a new one (raises MessageError)."""
        self.joiner.forget(name)
        if self.peers.pop(name, None) is not None:
            try:
                self.agent.remove_remote_agent(name)
            except Exception as error:
                raise MessageError(f"the connection to {name} can't be closed: {error!r}") from error
