"""What a server's operator can set about its replicas: the `replicas` section of the `starling` entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from starling.config.parsing import parse_fields

SECTION = "replicas"
KEY_ENV = "STARLING_REPLICA_KEY"
"""The environment variable with the key that peers need to call one another."""

EXPECTED = {
    "timeout": "a number above 0 (seconds)",
    "peers": "HOST:PORT or [IPV6]:PORT, or several with commas between them",
}


class ReplicaOptions(BaseModel):
    """How the replicas of one server work together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=30.0,
        description="seconds after which a replica that sends neither a response nor data is left out: another replica "
        "then computes the whole prompt; with --star-shards on the request fails",
    )
    peers: str = Field(
        default="",
        description="HOST:PORT of the gRPC fronts of servers with the same model, with commas between them. Each "
        "address behind a host's name is one server, and this server may be among them. Long prompts are split over "
        f"all of them. Needs --grpc-port, {KEY_ENV} and VLLM_HOST_IP",
    )

    @field_validator("peers")
    @classmethod
    def _check_peers(cls, value: str) -> str:
        for peer in split_peers(value):
            split_address(peer)
        return value


def split_peers(peers: str) -> list[str]:
    """The entries of a list of peers, HOST:PORT each; none where it is empty."""
    return [entry.strip() for entry in peers.split(",")] if peers else []


def split_address(entry: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address is in brackets, and returned without them.

    Raises:
        ValueError: the entry is something else.
    """
    host, _, port = entry.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("there is no host, or no port from 1 to 65535")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError("a part of the host between two dots is empty, or has over 63 characters") from None
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_replicas(values: Mapping[str, Any], prefix: str = f"{SECTION}.") -> ReplicaOptions:
    """Parse options under their bare names; ``prefix`` stands before a name in messages.

    Raises:
        OptionError: an unknown name, a timeout that is not a finite number above 0, or peers without host or port.
    """
    return parse_fields(ReplicaOptions, values, SECTION, expected=EXPECTED.__getitem__, prefix=prefix)
