"""The clock of leases: for how long pages of another server may still be read.

Its processes may be stopped, and its host suspended. CLOCK_BOOTTIME goes on in both cases, CLOCK_MONOTONIC stands while
the host is suspended, and the time of day can be set. A virtual machine that is paused may stop all of its clocks:
what holds.py reads then still tells whether pages were held.
"""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since this host has started. All processes of a host see the same time, and no other host does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
