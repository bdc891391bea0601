"""Addresses of the gRPC server, the limits of its memory and connections, and the options of gRPC that set them."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

MAX_REQUEST_BYTES = 8 * 2**20  # over 2 million token ids, or 8 MiB of text; uploads take longer prompts
MAX_ADMIN_BYTES = 256 * 2**10  # of a message to AdminService's own port

MAX_STREAMS = 1024  # calls of one connection at once

GRACE_SECONDS = 5.0  # for running calls, when the server stops

SERVER_OPTIONS = (
    # Without this, a second server could listen on the same port without an error and get half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_allowed_incoming_connections", 1024),
    ("grpc.server_handshake_timeout_ms", 20_000),  # to the end of the TLS handshake
    # With it gRPC opens the windows of all calls for messages that nobody reads yet. Without it the window of such a
    # call is 64 KiB, and grows by the message's size once the message is read.
    ("grpc.http2.bdp_probe", 0),
    # gRPC limits a message only after it is decompressed, and 8 MiB of gzip can become 8 GiB.
    ("grpc.compression_enabled_algorithms_bitset", 1),  # only `identity`
    # A client may vanish without closing its connection. Then its requests end within a minute: a connection on which
    # nothing arrives gets a ping, and is closed if the ping is not answered.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A stream has no messages during a long prefill. Don't close the connection of a client that pings meanwhile.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Return the options of a gRPC server whose messages have at most ``max_message_bytes``."""
    return [*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]


LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class AdminOptions:
    """Address and access of AdminService.

    Attributes:
        port: a port of its own, or None if it has none.
        host: the host of that port.
        key: key that calls need, and that also opens the service on the gRPC port, or None if there is no key.
    """

    port: int | None
    host: str
    key: str | None


NO_ADMIN = AdminOptions(None, LOOPBACK, None)


def is_loopback(host: str) -> bool:
    """Return whether a host is the local machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
