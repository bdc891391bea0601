"""Checks, what they measure, and how that is judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

NO_GPU = 2


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Result:
    """What a check measured.

    Attributes:
        measured: passes if it is at most ``bound``. NaN fails.
        bound: None for a measurement without a bound, which always passes.
        detail: further figures for the reader.
    """

    measured: float
    bound: float | None
    unit: str
    detail: str = ""


@dataclass(frozen=True)
class Skip:
    """Why a check can't run on this machine."""

    reason: str


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[], Result | Skip]


@dataclass(frozen=True)
class Outcome:
    """A check that has run; the fields are those of its line in the output.

    Attributes:
        measured: None for a check that was skipped or raised an exception.
        detail: the result's detail, the reason of a skip, or the exception.
    """

    name: str
    verdict: Verdict
    measured: float | None
    bound: float | None
    unit: str
    detail: str
    seconds: float


def judge(check: Check) -> Outcome:
    """Run a check. An exception of the check is a failure."""
    start = time.monotonic()
    try:
        result = check.run()
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return Outcome(check.name, Verdict.FAIL, None, None, "", detail, time.monotonic() - start)
    seconds = time.monotonic() - start
    if isinstance(result, Skip):
        return Outcome(check.name, Verdict.SKIP, None, None, "", result.reason, seconds)
    passed = not math.isnan(result.measured) and (result.bound is None or result.measured <= result.bound)
    verdict = Verdict.PASS if passed else Verdict.FAIL
    return Outcome(check.name, verdict, result.measured, result.bound, result.unit, result.detail, seconds)


def exit_code(outcomes: Iterable[Outcome], has_gpu: bool) -> int:
    """1 if a check failed; else ``NO_GPU`` without a GPU, where the CPU part passed; else 0."""
    if any(outcome.verdict is Verdict.FAIL for outcome in outcomes):
        return 1
    return 0 if has_gpu else NO_GPU
