"""Counts the calls of kernels and ops within a worker."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any


def counted(function: Any, ran: Counter[str]) -> Any:
    """The function, each call of which is counted in ``ran`` under the function's name."""

    @functools.wraps(function)
    def count(*args: Any, **kwargs: Any) -> Any:
        ran[function.__name__] += 1
        return function(*args, **kwargs)

    return count
