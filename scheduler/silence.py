"""How long another replica may keep silent, before what was to come from it is done without it."""

from __future__ import annotations

import math
import os

from scheduler.options import OptionError

SILENCE_ENV = "STARLING_SILENCE_SECONDS"
DEFAULT = "30"


def silence_seconds() -> float:
    """The environment's setting (raises OptionError: it is none)."""
    text = os.environ.get(SILENCE_ENV, DEFAULT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        reason = "it says for how many seconds a replica may keep silent"
        raise OptionError(SILENCE_ENV, text, reason, f"a number above 0; {DEFAULT} where it is not set")
    return seconds
