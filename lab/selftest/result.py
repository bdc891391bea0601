"""Checks, what they measure, how that is judged, and its record: `report.json`, and `report.md` to paste into an issue.

The record is written after each check. A run that was ended goes on: what passed, or was skipped, on the same machine
and with the same options is not run again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

NO_GPU = 2
JSON, PAGE = "report.json", "report.md"


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


class ReportError(ValueError):
    """A folder whose report is not of this machine and these options, or is no report."""


class Report:
    """What a folder has, and what a run adds.

    Args:
        folder: is made if it does not exist.
        machine: its description, as machine.py has it.
        options: of the command, without the folder.

    Raises:
        ReportError: the folder has a report of another machine or of other options, or a file that is none.
    """

    def __init__(self, folder: Path, machine: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.folder, self.machine, self.options = folder, dict(machine), dict(options)
        self.engines: dict[str, dict[str, str]] = {}
        self.kept: dict[str, Outcome] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            found = [from_json(fields) for fields in stored["checks"]]
            differing = [name for name in ("machine", "options") if stored[name] != vars(self)[name]]
            self.engines = stored["engines"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{path} is no report of `starling selftest`: {error!r}. Name another folder") from error
        if differing:
            raise ReportError(f"{path} was made with another {' and other '.join(differing)}. Name another folder")
        self.kept = {outcome.name: outcome for outcome in found if outcome.verdict is not Verdict.FAIL}

    def write(self, outcomes: Sequence[Outcome], engines: Mapping[str, dict[str, str]], code: int | None) -> None:
        """Store the checks so far.

        Args:
            engines: name of a setting -> the environment of its engine, for those that have run.
            code: the exit code; None while checks are left.
        """
        self.engines |= engines
        report = {
            "machine": self.machine,
            "options": self.options,
            "engines": self.engines,
            "checks": list(map(to_json, outcomes)),
            "exit": code,
        }
        for name, text in ((JSON, json.dumps(report, indent=2) + "\n"), (PAGE, page(report))):
            new = self.folder / f".{name}"
            new.write_text(text, encoding="utf-8")
            new.replace(self.folder / name)


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome's fields; null for a figure that is not finite, which JSON can't hold."""
    fields = asdict(outcome)
    return fields | {"measured": outcome.measured if math.isfinite(outcome.measured or 0) else None}


def from_json(fields: dict[str, Any]) -> Outcome:
    """The outcome of these fields (raises TypeError, KeyError or ValueError where they are others)."""
    return Outcome(**fields | {"verdict": Verdict(fields["verdict"])})


def figure(outcome: Outcome) -> str:
    """What was measured, and the bound: "0.9 x (at most 1.5)"."""
    measured = "" if outcome.measured is None else f"{outcome.measured:.3g} {outcome.unit}"
    return measured + ("" if outcome.bound is None else f" (at most {outcome.bound:.3g})")


def page(report: Mapping[str, Any]) -> str:
    """A report as Markdown: the machine, the engines, and a table of the checks."""
    outcomes = [from_json(fields) for fields in report["checks"]]
    counts = ", ".join(f"{sum(one.verdict is verdict for one in outcomes)} {verdict}" for verdict in Verdict)
    ended = "" if report["exit"] is not None else "; the run has not ended"
    lines = [f"# starling selftest: {counts}{ended}", ""]
    facts = {name: value for name, value in (report["machine"] | report["options"]).items() if value not in (None, [])}
    lines += [f"- {name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in facts.items()]
    for name, environment in report["engines"].items():
        lines.append(f"- {name}: {', '.join(f'{key} {value}' for key, value in environment.items())}")
    lines += ["", "| verdict | check | measured | details | seconds |", "| --- | --- | --- | --- | --- |"]
    for one in outcomes:
        cells = (one.verdict, one.name, figure(one), one.detail, f"{one.seconds:.0f}")
        lines.append(f"| {' | '.join(' '.join(str(cell).split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
