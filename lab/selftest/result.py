"""Checks, what they measure, how that is judged, and its record: `report.json`, and `report.md` to paste into an issue.

The record is written after each check. A run that was ended goes on: what passed, or was skipped, on the same machine
and with the same options is not run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

NO_GPU = 2
JSON, PAGE = "report.json", "report.md"


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Result:
    """Measurement of a check.

    Attributes:
        measured: value that passes if it is at most ``bound``. NaN fails.
        bound: None for a measurement without a bound, which always passes.
        detail: further figures for the reader.
    """

    measured: float
    bound: float | None
    unit: str
    detail: str = ""


@dataclass(frozen=True)
class Skip:
    """The reason why a check can't run on this machine."""

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
    """Return 1 if a check failed; else ``NO_GPU`` without a GPU, where the CPU part passed; else 0."""
    if any(outcome.verdict is Verdict.FAIL for outcome in outcomes):
        return 1
    return 0 if has_gpu else NO_GPU


class ReportError(ValueError):
    """A folder whose report is not of this machine and these options, or is no report."""


@dataclass(frozen=True)
class Record:
    """Content of `report.json`. A figure that is not finite is null there.

    Attributes:
        options: options of the command, without the folder.
        engines: name of a setting -> the environment of its engine, for those that have run.
        exit: the exit code, or None while checks are left.
    """

    machine: dict[str, Any]
    options: dict[str, Any]
    engines: dict[str, dict[str, str]] = field(default_factory=dict)
    checks: list[Outcome] = field(default_factory=list)
    exit: int | None = None


class Report:
    """Report of a folder, to which a run adds.

    Args:
        folder: folder of the report; made if it does not exist.
        machine: its description, as machine.py has it.
        options: options of the command, without the folder.

    Raises:
        ReportError: the folder has a report of another machine or of other options, or a file that is none.
    """

    def __init__(self, folder: Path, machine: dict[str, Any], options: dict[str, Any]) -> None:
        self.folder, self.record, self.json = folder, Record(machine, options), TypeAdapter(Record)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON
        if path.exists():
            try:
                stored = self.json.validate_json(path.read_bytes())
            except ValueError as error:
                raise ReportError(
                    f"{path} is no report of `starling selftest`: {error}. Name another folder"
                ) from error
            differing = [name for name in ("machine", "options") if vars(stored)[name] != vars(self.record)[name]]
            if differing:
                raise ReportError(f"{path} was made with another {' and other '.join(differing)}. Name another folder")
            self.record = stored
        self.kept = {outcome.name: outcome for outcome in self.record.checks if outcome.verdict is not Verdict.FAIL}

    def write(self, outcomes: Sequence[Outcome], engines: dict[str, dict[str, str]], code: int | None) -> None:
        """Store the checks so far; ``engines`` and ``code`` are as in ``Record``."""
        engines = self.record.engines | engines
        self.record = replace(self.record, engines=engines, checks=list(outcomes), exit=code)
        text = self.json.dump_json(self.record, indent=2).decode() + "\n"
        for name, content in ((JSON, text), (PAGE, page(self.json.validate_json(text)))):
            new = self.folder / f".{name}"
            new.write_text(content, encoding="utf-8")
            new.replace(self.folder / name)


def figure(outcome: Outcome) -> str:
    """Return what was measured, and the bound: "0.9 x (at most 1.5)"."""
    measured = "" if outcome.measured is None else f"{outcome.measured:.3g} {outcome.unit}"
    return measured + ("" if outcome.bound is None else f" (at most {outcome.bound:.3g})")


def page(record: Record) -> str:
    """Return a report as Markdown: the machine, the engines, and a table of the checks."""
    ended = "" if record.exit is not None else "; the run has not ended"
    lines = [f"# starling selftest: {count_verdicts(record.checks)}{ended}", ""]
    facts = {name: value for name, value in (record.machine | record.options).items() if value not in (None, [])}
    lines += [f"- {name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in facts.items()]
    for name, environment in record.engines.items():
        lines.append(f"- {name}: {', '.join(f'{key} {value}' for key, value in environment.items())}")
    lines += ["", "| verdict | check | measured | details | seconds |", "| --- | --- | --- | --- | --- |"]
    for one in record.checks:
        cells = (one.verdict, one.name, figure(one), one.detail, f"{one.seconds:.0f}")
        lines.append(f"| {' | '.join(' '.join(str(cell).split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def count_verdicts(outcomes: Sequence[Outcome]) -> str:
    """Return how many checks have each verdict."""
    return ", ".join(f"{sum(one.verdict is verdict for one in outcomes)} {verdict}" for verdict in Verdict)
