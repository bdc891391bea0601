"""Clients whose link goes down without a packet that says so: their requests end. Hosts are network namespaces."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from examples.two_hosts import available, two_hosts
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not available(), reason="needs root and network namespaces")]

# Until a lost connection ends: more than a client on a slow machine takes to answer a ping.
# STARLING_LOST_LINK_SECONDS=0: the server's own values, 40 s
SECONDS = os.environ.get("STARLING_LOST_LINK_SECONDS", "20")
SERVER = [sys.executable, "-m", "tests.e2e.lost_link_job"]
CALLS = (
    "from starling.client import Client; Client('{0}:50051').generate('abc')",
    "import http.client; c = http.client.HTTPConnection('{0}', 8000); c.request('POST', '/', b'{{}}'); c.getresponse()",
)


def test_a_request_ends_after_the_link_to_its_client_is_cut(tmp_path: Path):
    log = tmp_path / "server.log"

    def says(*lines: str) -> bool:
        return set(lines) <= set(log.read_text().splitlines())

    with two_hosts() as (here, there):
        processes = [here.popen([*SERVER, here.address, SECONDS], log)]
        try:
            assert wait_until(lambda: says("ready")), log.read_text()
            for call in CALLS:
                command = [sys.executable, "-c", call.format(here.address)]
                processes.append(there.popen(command, tmp_path / "client.log"))
            assert wait_until(lambda: says("grpc started", "http started")), log.read_text()
            assert not says("grpc ended") and not says("http ended")
            there.cut()
            assert wait_until(lambda: says("grpc ended", "http ended")), log.read_text()
        finally:
            for process in processes:
                process.kill()
                process.wait()
