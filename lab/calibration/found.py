"""What a run of `starling calibrate` has computed so far, in a file, so that a run that was ended can go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from starling.lab.calibration.integrated_gradients import ScoredPrompt

Compute = Callable[[ScoredPrompt], Any]
"""Gives the value of a prompt, as JSON holds it."""


def part_of(out: Path) -> Path:
    """The file of what is scored so far."""
    return out.with_name(f"{out.name}.part")


class Found:
    """What is computed so far, in a file: by its kind, and by the names of prompts.

    Raises:
        ValueError: the file is of another model or of other options.
    """

    def __init__(self, path: Path, setup: dict[str, Any], progress: Progress) -> None:
        self.path, self.setup, self.progress = path, setup, progress
        self.values: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                known, self.values = content["setup"], {kind: dict(of) for kind, of in content["values"].items()}
            except (ValueError, LookupError, TypeError, AttributeError):
                known = None
            if known != json.loads(json.dumps(setup)):
                raise ValueError(
                    f"{path} has scores of another model or other options: remove it, or take another --out"
                )

    def computed(
        self,
        kind: str,
        prompts: Sequence[ScoredPrompt],
        opened: Callable[[], contextlib.AbstractContextManager[Compute]],
    ) -> list[Any]:
        """A value for each prompt; those that an earlier run found are not computed again.

        Args:
            opened: makes what computes a prompt's value, where there is one to compute.
        """
        values = self.values.setdefault(kind, {})
        missing = [prompt for prompt in prompts if prompt.name not in values]
        bar = self.progress.add_task(kind, total=len(prompts), completed=len(prompts) - len(missing))
        with opened() if missing else contextlib.nullcontext() as compute:
            for prompt in missing:
                values[prompt.name] = compute(prompt) if compute else None
                replace_text(self.path, json.dumps({"setup": self.setup, "values": self.values}))
                self.progress.advance(bar)
        return [values[prompt.name] for prompt in prompts]


def replace_text(path: Path, text: str) -> None:
    """Write a file at once, so that an interrupted process leaves the old one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
