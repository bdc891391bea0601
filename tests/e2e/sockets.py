"""The sockets that a server opens, and those that docs/security.md lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.e2e.wait import wait_until

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
LISTENS, UNCONNECTED = 0x0A, 0x07  # states of a TCP and of a UDP socket in /proc
ACCEPTS, DATAGRAM = 0x10000, 2  # flag and type of a unix socket in /proc


class Socket(NamedTuple):
    """A socket to which other processes can connect or send.

    Attributes:
        process: the process's name, without its number among others of this name.
        kind: TCP, UDP or unix.
        reach: loopback, every address, or an IP address; for a unix socket, file or abstract.
    """

    process: str
    kind: str
    reach: str


def open_sockets(pid: int) -> set[Socket]:
    """The sockets of a process and of its descendants, each looked up in the network namespace of its process."""
    root = psutil.Process(pid)
    return {socket for process in [root, *root.children(recursive=True)] for socket in of_process(process)}


def assert_sockets(found: Callable[[], set[Socket]], listed: set[Socket]) -> None:
    """Compare the sockets with those that are listed, once a server has opened and closed all of its start.

    One of several API servers may answer before another one has started.
    """

    def are_equal() -> bool:
        try:
            return found() == listed
        except (OSError, psutil.NoSuchProcess):  # a descriptor was closed, or a process ended, between two looks
            return False

    assert wait_until(are_equal), found()


def of_process(process: psutil.Process) -> Iterator[Socket]:
    name = re.sub(r"_\w+$", "", process.name())
    proc = Path("/proc") / str(process.pid)
    links = [link.readlink().name for link in (proc / "fd").iterdir()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links}
    for file, kind, state in (("tcp", "TCP", LISTENS), ("udp", "UDP", UNCONNECTED)):
        for line in lines_of(proc / "net" / file) + lines_of(proc / "net" / f"{file}6"):
            if int(line[3], 16) == state and line[9] in inodes:
                yield Socket(name, kind, reach_of(line[1]))
    for line in lines_of(proc / "net" / "unix"):
        takes = int(line[3], 16) & ACCEPTS or int(line[4], 16) == DATAGRAM
        if takes and line[6] in inodes and len(line) > 7:
            yield Socket(name, "unix", "abstract" if line[7].startswith("@") else "file")


def lines_of(path: Path) -> list[list[str]]:
    """The fields of each line of a table in /proc, without its heading."""
    return [line.split() for line in path.read_text().splitlines()[1:]] if path.exists() else []


def reach_of(local: str) -> str:
    """Who reaches a socket, from the kernel's hexadecimal ``address:port``."""
    digits = bytes.fromhex(local.split(":")[0])
    words = [digits[at : at + 4][::-1] for at in range(0, len(digits), 4)]  # each in the host's order of bytes
    address = ip_address(b"".join(words))
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_unspecified:
        return "every address"
    return "loopback" if address.is_loopback else str(address)


def documented_sockets(heading: str, **addresses: str) -> set[Socket]:
    """The table under a heading of docs/security.md.

    Args:
        addresses: an IP address for a word of the table's column for the reach.

    Raises:
        ValueError: there is no such heading.
    """
    _, found, rest = SECURITY.read_text().partition(f"### {heading}\n")
    if not found:
        raise ValueError(f"{SECURITY.name} has no heading {heading!r}")
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| `?([^|`]+?)`? \|", rest.split("\n#")[0], re.MULTILINE)
    return {Socket(process, kind, addresses.get(reach, reach)) for process, kind, reach in rows}
