"""The record of a self-test in a folder: `report.json`, and `report.md`, a page to paste into an issue.

It is written after each check. A run that was ended goes on: what passed, or was skipped, on the same machine and with
the same options is not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.lab.selftest.result import Outcome, Verdict

JSON, PAGE = "report.json", "report.md"


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
