"""The network devices that NIXL may use: loopback on one host, the device of VLLM_HOST_IP between hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from starling.features.replicas import network
from starling.features.replicas.network import (
    ADDRESS_ENV,
    DEVICES_ENV,
    GLOO_ENV,
    NetworkError,
    devices,
    keep_gloo_on_loopback,
    use_devices,
)
from starling.features.replicas.notifications import nixl_problem

CARDS = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.1", "fd00::1", "fe80::1%eth0", "02:00:00:00:00:01"],
    "eth1": ["fe80::1%eth1"],
    "ib0": ["10.1.0.1"],
}


@pytest.fixture
def cards(monkeypatch, tmp_path):
    found = {name: [SimpleNamespace(address=address) for address in addresses] for name, addresses in CARDS.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(network, "SYS_NET", tmp_path)
    (tmp_path / "ib0" / "device" / "infiniband" / "mlx5_1").mkdir(parents=True)
    (tmp_path / "ib0" / "dev_port").write_text("1\n")


@pytest.mark.parametrize(
    ("one_host", "environ", "expected"),
    [
        (True, {}, "lo"),
        (True, {ADDRESS_ENV: "10.0.0.1"}, "lo"),
        (True, {DEVICES_ENV: "eth0"}, "eth0"),
        (False, {ADDRESS_ENV: "10.0.0.1"}, "eth0"),
        (False, {ADDRESS_ENV: "fd00:0::1"}, "eth0"),
        (False, {ADDRESS_ENV: "[FD00::1]"}, "eth0"),
        (False, {ADDRESS_ENV: "fe80::1%eth1"}, "eth1"),
        (False, {ADDRESS_ENV: "10.1.0.1"}, "ib0,mlx5_1:2"),
        (False, {DEVICES_ENV: "mlx5_0:1"}, "mlx5_0:1"),
    ],
)
def test_the_devices(cards, one_host, environ, expected):
    assert devices(one_host, environ) == use_devices(one_host, environ) == environ[DEVICES_ENV] == expected


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, f"{ADDRESS_ENV} is not set"),
        ({ADDRESS_ENV: ""}, f"{ADDRESS_ENV} is not set"),
        ({ADDRESS_ENV: "10.9.9.9"}, "no network device of this host has the address 10.9.9.9"),
        ({ADDRESS_ENV: "host-a"}, "no network device of this host has the address host-a"),
    ],
)
def test_between_hosts_the_device_must_be_known(cards, environ, reason):
    with pytest.raises(NetworkError, match=reason):
        devices(False, environ)


@pytest.mark.parametrize(("environ", "expected"), [({}, "lo"), ({GLOO_ENV: "eth0"}, "eth0")])
def test_gloo_is_kept_on_loopback_unless_the_user_names_a_device(cards, environ, expected):
    keep_gloo_on_loopback(environ)
    assert environ == {GLOO_ENV: expected}


LISTENING = """
import os, psutil
from starling.features.replicas.notifications import MessageLimits, Messenger
from starling.features.replicas.network import use_devices
from starling.features.replicas.network import make_agent
use_devices(True, os.environ)
agents = make_agent("pages"), Messenger("messages", MessageLimits(2**20))
sockets = psutil.Process().net_connections(kind="inet")
print("listens on", *{socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN})
"""


@pytest.mark.skipif(nixl_problem() is not None, reason="needs NIXL")
def test_nixls_agents_listen_on_loopback_alone():
    """In a process of their own: UCX reads the variable when the first agent is made."""
    environ = {name: value for name, value in os.environ.items() if name != DEVICES_ENV}
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.splitlines()[-1] == "listens on 127.0.0.1"


def test_nixl_without_its_build_for_the_machines_cuda_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "nixl").mkdir()
    (tmp_path / "nixl/__init__.py").write_text("raise ImportError('detected CUDA 13 but nixl-cu13 is not installed')")
    for name in [name for name in sys.modules if name.split(".")[0] == "nixl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert nixl_problem.__wrapped__() == "detected CUDA 13 but nixl-cu13 is not installed"
