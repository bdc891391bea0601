"""The ports of a server that an example or a test starts."""

import socket

from examples.server import free_ports


def test_ports_are_free_differ_and_lie_below_those_of_outgoing_connections():
    taken = free_ports(0)[0]
    with socket.create_server(("127.0.0.1", taken)):
        ports = free_ports(taken, taken, *[0] * 500)
    assert len({taken, *ports}) == 503 and max(ports) < 32768


def test_a_preferred_port_is_used_once():
    [port] = free_ports(0)
    first, second = free_ports(port, port)
    assert first == port != second
