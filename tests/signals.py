"""The handlers of signals that a process has."""

import contextlib
import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handlers() -> dict[signal.Signals, object]:
    return {number: signal.getsignal(number) for number in ENDING}


@contextlib.contextmanager
def kept_signals():
    """After the block, each signal has the handler that it had before."""
    before = handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
