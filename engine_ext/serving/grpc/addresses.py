"""Addresses on which the gRPC server listens."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

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
