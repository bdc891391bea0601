"""Messages between engine processes over NIXL's notifications: shared memory on one host, TCP or RDMA between hosts.

A notification needs no registered memory. So a response that arrives after its receiver has given up overwrites
nothing.

UCX sends notifications slowly once they exceed one of its fragments: a megabyte in one notification takes several times
as long as in frames of 16 KiB. Therefore messages are cut into frames.

The agents have no progress thread. ``receive`` drives the transport; with NIXL's own thread, a message would wait for
that thread's next round on both sides. ``send`` needs no driving after it returns: measured, 4 MiB have gone out by
then.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.logger import init_logger

logger = init_logger("vllm.starling")

FRAME_BYTES = 16 * 1024
FRAME = struct.Struct("<QII")
"""Before each frame: the number of its message, its index in the message, and the message's count of frames."""

HEADER = struct.Struct("<I")
"""Before each message's header: the header's bytes."""


@functools.cache
def nixl_problem() -> str | None:
    """Why NIXL can't be imported; None where it can.

    NIXL that is installed refuses its import where its build for the machine's CUDA is not. An import loads no UCX.
    """
    try:
        importlib.import_module("nixl._api")
    except ImportError as error:
        return str(error)
    return None


class MessageError(Exception):
    """A message can't be sent; says why."""


class FrameError(Exception):
    """A frame is not one that ``frames`` makes, or exceeds a limit; says why."""


@dataclass(frozen=True)
class Message:
    """A received message.

    Attributes:
        header: what msgpack takes.
        body: raw bytes.
    """

    sender: str
    header: dict[str, Any]
    body: bytearray


@dataclass(frozen=True)
class MessageLimits:
    """Sizes of messages that a receiver takes.

    Attributes:
        message_bytes: of one message, its header included.
        num_senders: as many messages of that size may be incomplete at the same time.
    """

    message_bytes: int
    num_senders: int = 1

    @property
    def message_frames(self) -> int:
        return -(-self.message_bytes // FRAME_BYTES)


def frames(number: int, header: dict[str, Any], body: bytes) -> Iterator[bytes]:
    """Cut a message into the frames that are sent."""
    packed = msgspec.msgpack.encode(header)
    whole = HEADER.pack(len(packed)) + packed + body
    count = -(-len(whole) // FRAME_BYTES)
    for index in range(count):
        yield FRAME.pack(number, index, count) + whole[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]


class FrameAssembler:
    """Puts the frames of messages together again, in whatever order they arrive.

    Attributes:
        incomplete: (sender, number of the message) -> its frames so far, by index.
    """

    def __init__(self, limits: MessageLimits) -> None:
        self.limits = limits
        self.incomplete: dict[tuple[str, int], dict[int, bytes]] = {}

    def add(self, sender: str, frame: bytes) -> Message | None:
        """Take a frame; returns the message that the frame completes, or None.

        Raises:
            FrameError: the frame is refused. So are the other frames of its message.
        """
        number, index, count = self._unpack(frame)
        parts = self.incomplete.setdefault((sender, number), {})
        if any(FRAME.unpack_from(part)[2] != count for part in list(parts.values())[:1]) or index in parts:
            del self.incomplete[sender, number]
            raise FrameError(f"message {number} has frames that contradict one another")
        parts[index] = frame
        if len(parts) < count:
            self._check_room(sender, number)
            return None
        del self.incomplete[sender, number]
        whole = bytearray()
        for part in range(count):
            whole += memoryview(parts[part])[FRAME.size :]
        return Message(sender, *split_message(whole))

    def _unpack(self, frame: bytes) -> tuple[int, int, int]:
        """Return the number of a frame's message, the frame's index, and the count of frames."""
        if not FRAME.size <= len(frame) <= FRAME.size + FRAME_BYTES:
            raise FrameError(f"it has {len(frame)} bytes, and not {FRAME.size} to {FRAME.size + FRAME_BYTES}")
        number, index, count = FRAME.unpack_from(frame)
        if not index < count <= self.limits.message_frames:
            raise FrameError(f"it is frame {index} of {count}, and a message has at most {self.limits.message_frames}")
        if index < count - 1 and len(frame) < FRAME.size + FRAME_BYTES:
            raise FrameError(f"it is truncated: it has {len(frame)} bytes, and is not the last one")
        return number, index, count

    def _check_room(self, sender: str, number: int) -> None:
        num_frames = sum(map(len, self.incomplete.values()))
        if num_frames > self.limits.message_frames * self.limits.num_senders:
            del self.incomplete[sender, number]
            raise FrameError(f"{num_frames} frames of incomplete messages are waiting already")

    def drop(self, sender: str) -> None:
        """Drop the incomplete messages of a sender."""
        for key in [key for key in self.incomplete if key[0] == sender]:
            del self.incomplete[key]


def split_message(whole: bytearray) -> tuple[dict[str, Any], bytearray]:
    """Return the header and the body of a message.

    Raises:
        FrameError: it has no header.
    """
    try:
        (size,) = HEADER.unpack_from(whole)
        header = msgspec.msgpack.decode(memoryview(whole)[HEADER.size : HEADER.size + size], type=dict[str, Any])
    except (struct.error, msgspec.DecodeError) as error:
        raise FrameError(f"its message has no header: {error}") from error
    del whole[: HEADER.size + size]
    return header, whole


class Messenger:
    """One end of the message connections; to be used by one thread.

    Args:
        name: unique among all messengers.
        limits: of the messages that it receives.
    """

    def __init__(self, name: str, limits: MessageLimits) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.address = {"name": name, "metadata": self.agent.get_agent_metadata()}
        self.assembler = FrameAssembler(limits)
        self.connected: dict[str, str] = {}  # agents by name, as NIXL calls them
        self.num_sent = 0

    def is_connected(self, name: str) -> bool:
        return name in self.connected

    def connect(self, address: dict[str, Any]) -> None:
        """Make it possible to send messages to the messenger at ``address``.

        Raises:
            MessageError: NIXL can't reach it.
        """
        try:
            self.connected[address["name"]] = self.agent.add_remote_agent(address["metadata"])
        except Exception as error:  # NIXL's own exceptions have no common class
            raise MessageError(f"NIXL can't reach {address['name']}: {error!r}") from error

    def send(self, name: str, header: dict[str, Any], body: bytes = b"") -> None:
        """Hand a message to the transport.

        Raises:
            MessageError: NIXL can't send it.
        """
        self.num_sent += 1
        try:
            for frame in frames(self.num_sent, header, body):
                self.agent.send_notif(self.connected[name], frame)
        except Exception as error:
            raise MessageError(f"NIXL can't send to {name}: {error!r}") from error

    def receive(self) -> list[Message]:
        """Return the messages completed since the last call, without waiting; log and drop frames that are refused."""
        messages = []
        for sender, sent in self.agent.get_new_notifs().items():
            refused: list[FrameError] = []
            for frame in sent:
                try:
                    message = self.assembler.add(sender, frame)
                except FrameError as error:
                    refused.append(error)
                else:
                    messages += [] if message is None else [message]
            if refused:
                logger.error("%d frames of %r are refused; the first one: %s", len(refused), sender, refused[0])
        return messages

    def disconnect(self, name: str) -> None:
        """Close the connection to a peer that does not respond. ``connect`` can make a new one.

        Raises:
            MessageError: NIXL can't close it.
        """
        self.assembler.drop(name)
        if self.connected.pop(name, None) is not None:
            try:
                self.agent.remove_remote_agent(name)
            except Exception as error:
                raise MessageError(f"the connection to {name} can't be closed: {error!r}") from error
