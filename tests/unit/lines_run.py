"""How many lines of Python a call runs: the work of a function, counted, so that no clock is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PROJECT = f"{Path(__file__).parents[2]}/"
INSTALLED = f"{PROJECT}.venv"


def lines_run(function: Callable[[], Any]) -> int:
    """Lines of this project that this thread runs in a call, those of all functions that it calls included.

    Other lines may run at any time: those of the garbage collector's callbacks.
    """
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if not name.startswith(PROJECT) or name.startswith(INSTALLED):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count
