"""Scores of KV heads: by gradients in this process; a run that was ended goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.progress import Progress

from starling.config.head_scores import HeadScores
from starling.lab.calibration.gated_model import Case, GatedModel, ScoredPrompt
from starling.lab.evaluation.prompt_options import Length, PromptOptions
from starling.lab.models import ModelError


class CalibrationOptions(PromptOptions):
    """Options of `starling calibrate`: what is scored, on which prompts, and how."""

    lengths: tuple[Length, ...] = Field((1024,), min_length=1, description="tokens of a prompt and its answer")
    prompts_per_cell: int = Field(2, ge=1, description="prompts of each task and length")
    prompt_seed: int = Field(100, description="of the tasks' prompts")
    blocks: int = Field(16, ge=2, description="star blocks that a prompt is cut into")
    query_tokens: int = Field(128, ge=1, description="of the prompt's end, which see the whole prompt")
    steps: int = Field(3, ge=1, description="points between star and dense at which the gradient is taken")
    curve_prompts: int = Field(1, ge=0, description="prompts of each task and length for the curve; 0: no curve")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="of the computation; auto: bfloat16 on GPUs, float32 on CPUs, most of which are slow in it",
    )

    @property
    def chosen_dtype(self) -> str:
        """Return the dtype of the computation."""
        auto = "float32" if self.device == "cpu" else "bfloat16"
        return auto if self.dtype == "auto" else self.dtype

    def setup(self) -> dict[str, Any]:
        """Return the options that decide the scores, as JSON."""
        own = {name: getattr(self, name) for name in ("blocks", "query_tokens", "steps")}
        return self.prompts_setup() | own | {"dtype": self.chosen_dtype}


Compute = Callable[[ScoredPrompt], Any]
"""Gives the value of a prompt, as JSON holds it."""
Rows = tuple[tuple[float, ...], ...]
"""For each layer a score for each KV head; none for layers that are not full attention."""


def part_of(out: Path) -> Path:
    """Return the file of what is scored so far."""
    return out.with_name(f"{out.name}.part")


class Found:
    """Values that are computed so far, in a file: by their kind, and by the names of prompts.

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
        """Return a value for each prompt; those that an earlier run found are not computed again.

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


class GradientScorer:
    """Scores by passes through a model in this process."""

    def __init__(self, model: GatedModel, options: CalibrationOptions) -> None:
        self.model, self.options = model, options

    def scores(self, found: Found, prompts: Sequence[ScoredPrompt]) -> Rows:
        of_case = self._each(lambda case: case.scores(self.options.steps).tolist())
        values = found.computed("scores", prompts, lambda: of_case)
        rows = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        return tuple(rounded(row) if full else () for row, full in zip(rows, self.model.is_full, strict=True))

    def measured(self, scores: HeadScores, counts: Sequence[int]) -> contextlib.AbstractContextManager[Compute]:
        """Return a function that gives a prompt's divergences, with each of ``counts`` as the number of dense heads."""
        return self._each(lambda case: list(case.divergences(scores.order, counts)))

    def _each(self, compute: Callable[[Case], Any]) -> contextlib.AbstractContextManager[Compute]:
        options = self.options

        def computed(prompt: ScoredPrompt) -> Any:
            value = compute(Case(self.model, prompt, options.blocks, options.query_tokens))
            if not torch.tensor(value).isfinite().all():
                reason = f"in {options.chosen_dtype} its results are not finite numbers"
                raise ModelError(f"the prompt {prompt.name} can't be scored: {reason}. Try --dtype float32")
            return value

        return contextlib.nullcontext(computed)


def rounded(row: Sequence[float]) -> tuple[float, ...]:
    """Return four digits of each score."""
    return tuple(float(f"{score:.4g}") for score in row)
