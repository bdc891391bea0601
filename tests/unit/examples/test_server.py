"""The ports of a server that an example or a test starts, and the signals that end it."""

import signal
import socket

import pytest

from examples.server import end_on_signals, free_ports
from tests.signals import ENDING, kept_signals


def test_ports_are_free_differ_and_lie_below_those_of_outgoing_connections():
    taken = free_ports(0)[0]
    with socket.create_server(("127.0.0.1", taken)):
        ports = free_ports(taken, taken, *[0] * 500)
    assert len({taken, *ports}) == 503 and max(ports) < 32768


def test_a_preferred_port_is_used_once():
    [port] = free_ports(0)
    first, second = free_ports(port, port)
    assert first == port != second


def test_each_signal_ends_a_program_but_the_one_that_nohup_ignores():
    with kept_signals():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        end_on_signals()
        for number in ENDING:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        end_on_signals()
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
