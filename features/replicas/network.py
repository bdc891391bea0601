"""Network devices and NIXL agents with which replicas exchange KV pages: checked at the start, set in a worker.

NIXL moves them with UCX. UCX listens on every network device of the host unless UCX_NET_DEVICES names some, and its
protocol has no authentication: a peer that reaches such a port can write the memory of the worker behind it. So between
replicas of one host it uses the loopback device alone. Between hosts it uses the device that has the address
VLLM_HOST_IP, which belongs into a network of the replicas' own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import psutil

DEVICES_ENV = "UCX_NET_DEVICES"
ADDRESS_ENV = "VLLM_HOST_IP"
GLOO_ENV = "GLOO_SOCKET_IFNAME"
LOOPBACK_ADDRESS = "127.0.0.1"
SYS_NET = Path("/sys/class/net")
PROGRESS_MICROSECONDS = 1000


class NetworkError(RuntimeError):
    """It is not known over which device replicas on other hosts are reached."""


def devices(one_host: bool, environ: Mapping[str, str]) -> str:
    """Return the value for UCX_NET_DEVICES on this host, the user's own if there is one.

    Args:
        one_host: whether all replicas are on this host.

    Raises:
        NetworkError: replicas are on other hosts, and VLLM_HOST_IP does not say by which address they reach this one.
    """
    if environ.get(DEVICES_ENV):
        return environ[DEVICES_ENV]
    address = LOOPBACK_ADDRESS if one_host else environ.get(ADDRESS_ENV)
    if not address:
        raise NetworkError(f"{ADDRESS_ENV} is not set")
    device = device_of(address)
    if device is None:
        raise NetworkError(f"no network device of this host has the address {address}")
    return ",".join([device, *rdma_devices(device)])


def device_of(address: str) -> str | None:
    """Return the network device with an IP address, such as eth0, or None if no device has it."""
    wanted = parse(address)
    for name, addresses in psutil.net_if_addrs().items():
        if wanted is not None and wanted in map(parse, (item.address for item in addresses)):
            return name
    return None


def parse(address: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(address.strip("[]"))
    except ValueError:
        return None  # psutil also lists hardware addresses


def rdma_devices(device: str) -> list[str]:
    """Return UCX's names of the RDMA devices behind a network device, such as mlx5_0:1; most cards have none."""
    folder = SYS_NET / device
    ports = folder / "dev_port"
    port = int(ports.read_text()) + 1 if ports.is_file() else 1
    return sorted(f"{found.name}:{port}" for found in (folder / "device" / "infiniband").glob("*"))


def keep_gloo_on_loopback(environ: MutableMapping[str, str]) -> None:
    """Let the workers of one host meet on the loopback device.

    torch's Gloo groups listen on the address that the host's name resolves to, which may be one of the network, and
    have no authentication either.
    """
    device = device_of(LOOPBACK_ADDRESS)
    if device is not None:
        environ.setdefault(GLOO_ENV, device)


def use_devices(one_host: bool, environ: MutableMapping[str, str]) -> str:
    """Let every NIXL agent that this process makes from now on use ``devices`` alone; returns them."""
    environ[DEVICES_ENV] = devices(one_host, environ)
    return environ[DEVICES_ENV]


def make_agent(name: str) -> Any:
    """Return a NIXL agent whose progress thread looks for work every millisecond.

    With NIXL's Python defaults the thread never sleeps, so that an idle replica takes a core from one that computes.
    The constructor sets the delay to 0 and passes it to the binding, where this function changes it. Goes when
    nixl_agent_config takes the delay.
    """
    from nixl._api import nixl_agent, nixl_agent_config

    binding = sys.modules[nixl_agent.__module__].nixlBind
    original = binding.nixlAgent

    def with_delay(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_MICROSECONDS
        return original(name, config)

    binding.nixlAgent = with_delay
    try:
        return nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    finally:
        binding.nixlAgent = original
