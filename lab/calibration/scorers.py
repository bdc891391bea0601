"""The two ways to score KV heads: by gradients in this process, and by the answers of servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from vllm.platforms import current_platform

from starling.config.head_scores import HeadScores
from starling.lab.calibration.ablation import Head, fitted_scores, group_counts, random_orders, served_order
from starling.lab.calibration.calibration_options import CalibrationOptions
from starling.lab.calibration.found import Compute, Found
from starling.lab.calibration.gated_model import GatedModel, layers_of
from starling.lab.calibration.integrated_gradients import Case, ScoredPrompt
from starling.lab.evaluation.server_process import option_name
from starling.lab.models import ModelError

Rows = tuple[tuple[float, ...], ...]
"""For each layer a score for each KV head; none for layers that are not full attention."""


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
        """A function that gives a prompt's divergences with so many of the first heads dense."""
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
        folder: of the model.
        made: what a file of scores says of the model and of how it was made.
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
        """A function that gives a prompt's divergences with so many of the first heads dense."""
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
    """Four digits of each score."""
    return tuple(float(f"{score:.4g}") for score in row)
