"""Scores of KV heads: by gradients in this process, or by the answers of servers; a run that was ended goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import AutoConfig
from vllm.platforms import current_platform

from starling.config.head_scores import HeadScores
from starling.lab.calibration.ablation import Head, fitted_scores, group_counts, random_orders, served_order
from starling.lab.calibration.calibration_options import CalibrationOptions
from starling.lab.calibration.gated_model import Case, GatedModel, ScoredPrompt, layers_of
from starling.lab.evaluation.server_process import option_name
from starling.lab.models import ModelError

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


class AblationScorer:
    """Scores by the answers of a server, one for each order of the heads.

    Args:
        folder: folder of the model.
        made: fields of a file of scores about the model and how it was made.
        log: file for the output of the servers.
    """

    def __init__(self, folder: Path, made: dict[str, Any], options: CalibrationOptions, log: Path) -> None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.is_full, self.num_kv_heads = layers_of(config)
        self.made, self.options, self.log = made, options, log
        dtype = [] if options.dtype == "auto" else ["--dtype", options.dtype]
        # vLLM's pages on CPUs have 128 tokens, so that n/16 of a short prompt would have no overlap.
        has_own = "--block-size" in map(option_name, options.serve_options)
        pages = ["--block-size", "32"] if current_platform.is_cpu() and not has_own else []
        self.serve_options = [*options.serve_options, *dtype, *pages]

    def scores(self, found: Found, prompts: Sequence[ScoredPrompt]) -> Rows:
        heads = [(layer, head) for layer, full in enumerate(self.is_full) if full for head in range(self.num_kv_heads)]
        orders, counts = random_orders(heads, self.options.orders), group_counts(len(heads), self.options.groups)
        measured = []
        for number, order in enumerate(orders, start=1):
            name = f"order {number} of {len(orders)}"
            values = found.computed(name, prompts, partial(self.measured, self._in_order(order), counts))
            measured.append(torch.tensor(values, dtype=torch.float64).mean(0).tolist())
        return self._rows(fitted_scores(orders, counts, measured))

    def measured(self, scores: HeadScores, counts: Sequence[int]) -> contextlib.AbstractContextManager[Compute]:
        """Return a function that gives a prompt's divergences, with each of ``counts`` as the number of dense heads."""
        blocks, query_tokens = self.options.blocks, self.options.query_tokens
        return served_order(self.made["model"], scores, blocks, query_tokens, counts, self.serve_options, self.log)

    def _in_order(self, heads: Sequence[Head]) -> HeadScores:
        return HeadScores(scores=self._rows({head: -float(rank) for rank, head in enumerate(heads)}), **self.made)

    def _rows(self, scores: dict[Head, float]) -> Rows:
        heads = range(self.num_kv_heads)
        return tuple(
            rounded([scores[layer, head] for head in heads]) if full else () for layer, full in enumerate(self.is_full)
        )


def rounded(row: Sequence[float]) -> tuple[float, ...]:
    """Return four digits of each score."""
    return tuple(float(f"{score:.4g}") for score in row)
