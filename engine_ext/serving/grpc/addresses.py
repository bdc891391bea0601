"""Where the gRPC server listens."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class AdminOptions:
    """Where AdminService is served, and to whom.

    Attributes:
        port: a port of its own; None: there is none.
        host: the host of that port.
        key: calls need this key, and with it the service is open on the gRPC port too; None: there is no key.
    """

    port: int | None
    host: str
    key: str | None


NO_ADMIN = AdminOptions(None, LOOPBACK, None)


def is_loopback(host: str) -> bool:
    """Whether a host is the local machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
