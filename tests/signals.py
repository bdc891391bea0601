"""The handlers of signals that a process has."""

import contextlib
import signal
from collections.abc import Collection, Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handlers() -> dict[signal.Signals, object]:
    return {number: signal.getsignal(number) for number in ENDING}


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """After the block, each signal has the handler that it had before."""
    before = handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ignored_by_children(ignored: Collection[int] = ()) -> Iterator[None]:
    """The processes that the block starts ignore these of the signals in ENDING, and no others.

    A process inherits what its parent ignores. Under nohup the tests ignore SIGHUP, and in a background job of a script
    SIGINT.
    """
    with kept_signals():
        for number in ENDING:
            if number in ignored:
                signal.signal(number, signal.SIG_IGN)
            elif signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        yield
