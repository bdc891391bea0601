"""Self-distillation: the model with an adapter learns what the model without it says with dense attention.

The loss is KL(dense base model, model with the adapter under a star plan) at the tokens of questions and answers. No
label and no other model is needed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from starling.config.adapter import Purpose
from starling.config.star import StarOptions
from starling.lab.distillation.adapted_model import AdaptedModel, make_rows
from starling.lab.evaluation.document_prompts import DocumentPrompt
from starling.lab.models import ModelError, kl_at_each
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.plan import StarPlan

PAGE = 16
WARM_UP_STEPS = 10
AVERAGED_STEPS = 80
"""The adapter is a moving average over about so many steps: a step of one prompt points far beside the way."""

MAX_NORM = 1.0
DENSE_SHARE = 0.2
"""Share of the steps whose prompt has dense attention: there the model with the adapter is to stay as it is. Where
blocks lack what an answer needs, the loss can't fall, and would drive the adapter away from the model."""

RECALL_WEIGHT = 0.5
"""Weight of the questions for passages, beside the prompt's own questions."""

PATIENCE, LEAST_GAIN = 3, 0.01
"""Training ends after so many measurements in which the loss has not fallen by such a share."""

STAR_BLOCKS = (8, 16)
"""A prompt of star blocks has one of these numbers of them."""


def document_plan(prompt: DocumentPrompt) -> StarPlan:
    """Make the plan of a prompt's documents as an engine with pages of PAGE tokens makes it, without padding.

    Raises:
        ModelError: it has none.
    """
    segments = (*prompt.starts, len(prompt.context))
    plan = _plan(prompt, StarOptions(mode="on", segments=segments), 1)
    return replace(plan, anchor_size=plan.anchor_size // PAGE * PAGE)


def star_plan(prompt: DocumentPrompt, rng: Random) -> StarPlan:
    """Make a plan of star blocks, with an overlap or with A = B (raises ModelError)."""
    sizes: dict[str, Any] = {"block_size": f"n/{rng.choice(STAR_BLOCKS)}"}
    if rng.random() < 0.5:
        sizes["overlap_size"] = 0
    return _plan(prompt, StarOptions(mode="on", query_tokens=len(prompt.question), **sizes), PAGE)


def _plan(prompt: DocumentPrompt, options: StarOptions, page_size: int) -> StarPlan:
    ids = [*prompt.context, *prompt.question]
    decision = decide(StarOptions(), options, PromptFacts(len(ids), ids), EngineFacts(page_size))
    if decision.plan is None:
        raise ModelError(f"a prompt of {len(ids)} tokens has no plan: {decision.why}. Allowed: longer prompts")
    return decision.plan


def plan_for(purpose: Purpose, prompt: DocumentPrompt, rng: Random) -> StarPlan:
    """Make the plan of a prompt for one of an adapter's purposes (raises ModelError)."""
    return document_plan(prompt) if purpose == "documents" else star_plan(prompt, rng)


@dataclass(frozen=True)
class Losses:
    """Losses of one prompt, in nats.

    Attributes:
        everywhere: (questions,) mean KL from dense over the tokens of question and answer.
        answers: (questions,) mean KL at the tokens of the answer.
        is_recall: (questions,) bool, True if a question asks for a passage.
    """

    everywhere: torch.Tensor
    answers: torch.Tensor
    is_recall: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Return the training loss: the mean of the prompt's own questions, and RECALL_WEIGHT of the others'."""
        of_each = self.everywhere + self.answers
        kinds = ((~self.is_recall, 1.0), (self.is_recall, RECALL_WEIGHT))
        return torch.stack([weight * of_each[kind].mean() for kind, weight in kinds if kind.any()]).sum()


def losses(model: AdaptedModel, prompt: DocumentPrompt, plan: StarPlan | None, *, adapter: bool) -> Losses:
    """Return the losses of a prompt's answers by a plan against the base model's by dense attention.

    Args:
        plan: plan of the prompt, or None for dense attention.
        adapter: True if the adapter is on.
    """
    tails = [[*asked.question, *asked.answer[:-1]] for asked in prompt.asked]
    with torch.no_grad():
        dense = model.log_probs(make_rows(prompt.context, tails, None), adapter=False)
    found = model.log_probs(make_rows(prompt.context, tails, plan), adapter=adapter)
    kl = kl_at_each(dense, found).split([len(tail) for tail in tails])
    at_answers = [each[-len(asked.answer) :].mean() for each, asked in zip(kl, prompt.asked, strict=True)]
    is_recall = torch.tensor([asked.is_recall for asked in prompt.asked], device=found.device)
    return Losses(torch.stack([each.mean() for each in kl]), torch.stack(at_answers), is_recall)


@dataclass(frozen=True)
class HeldOut:
    """Prompts that an adapter is not trained on.

    Attributes:
        name: name of their kind.
        cases: (prompt, plan).
    """

    name: str
    cases: Sequence[tuple[DocumentPrompt, StarPlan]]

    def loss(self, model: AdaptedModel, *, adapter: bool) -> float:
        """Return the mean KL from dense at the tokens of answers, in nats."""
        with torch.no_grad():
            found = [losses(model, prompt, plan, adapter=adapter).answers.mean() for prompt, plan in self.cases]
        return float(torch.stack(found).mean())


class Training:
    """The state of a training, which can be stored and taken up again.

    Attributes:
        step: number of steps that are made.
        curve: measurements: {"step": N, "loss": {kind: nats}, "training_loss": nats}; the first one is without adapter.
        seconds: time that the steps took.
        average: average of the weights over the last steps.
        best: that average at the lowest mean loss of the kinds that count.
    """

    def __init__(
        self,
        model: AdaptedModel,
        make: Callable[[int], tuple[DocumentPrompt, StarPlan | None]],
        held_out: Sequence[HeldOut],
        counted: Sequence[str],
        steps: int,
        batch: int,
        learning_rate: float,
    ) -> None:
        """Prepare a training; no step is made yet.

        Args:
            make: number -> a training prompt and its plan, or None for dense attention.
            counted: the kinds of held-out prompts that decide which adapter is best.
        """
        self.model, self.make, self.held_out, self.counted = model, make, held_out, counted
        self.steps, self.batch, self.learning_rate = steps, batch, learning_rate
        self.optimizer = torch.optim.AdamW(model.parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.seconds, self.recent = 0, 0.0, [0.0]
        self.curve: list[dict[str, Any]] = []
        self.average = [parameter.detach().clone() for parameter in model.parameters]
        self.best: list[torch.Tensor] = []

    def measure(self) -> dict[str, Any]:
        """Measure the held-out losses of the average, and keep it where it is the best so far."""
        with self._using(self.average):
            found = {each.name: each.loss(self.model, adapter=bool(self.curve)) for each in self.held_out}
        self.curve.append(
            {"step": self.step, "loss": found, "training_loss": sum(self.recent) / max(len(self.recent), 1)}
        )
        self.recent = []
        if len(self.curve) > 1 and self.mean(-1) <= min(self.mean(place) for place in range(1, len(self.curve))):
            self.best = [value.clone() for value in self.average]
        return self.curve[-1]

    def mean(self, place: int) -> float:
        """Return the mean loss of the kinds that count, at a place of the curve, over that without adapter."""
        first, found = self.curve[0]["loss"], self.curve[place]["loss"]
        return sum(found[name] / max(first[name], 1e-9) for name in self.counted) / len(self.counted)

    @property
    def falls_no_more(self) -> bool:
        """Return whether the held-out loss has not fallen in the last measurements."""
        means = [self.mean(place) for place in range(1, len(self.curve))]
        return len(means) > PATIENCE and min(means[-PATIENCE:]) > min(means[:-PATIENCE]) * (1 - LEAST_GAIN)

    def make_step(self) -> float:
        """Train on the next prompts; returns the loss.

        Raises:
            ModelError: the loss is no finite number.
        """
        began = time.monotonic()
        share = min(1.0, (self.step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share
        self.optimizer.zero_grad()
        total = 0.0
        for number in range(self.step * self.batch, (self.step + 1) * self.batch):
            loss = losses(self.model, *self.make(number), adapter=True).total / self.batch
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ModelError(f"the loss of step {self.step + 1} is {total}: try a lower --learning-rate")
        torch.nn.utils.clip_grad_norm_(self.model.parameters, MAX_NORM)
        self.optimizer.step()
        self.step += 1
        share = 1 / min(self.step, AVERAGED_STEPS)
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.model.parameters], share)
        self.seconds += time.monotonic() - began
        self.recent.append(total)
        return total

    def use_best(self) -> None:
        """Give the model the best adapter."""
        self._put(self.best)

    def use_average(self) -> None:
        """Give the model the average over the last steps."""
        self._put(self.average)

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters, values, strict=True):
                parameter.copy_(value)

    @contextmanager
    def _using(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Give the model these weights for the duration of the block."""
        before = [parameter.detach().clone() for parameter in self.model.parameters]
        self._put(values)
        try:
            yield
        finally:
            self._put(before)

    def store(self, path: Path, setup: dict[str, Any]) -> None:
        """Write the state to a file, whole or not at all."""
        state = {
            "setup": setup,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "parameters": [parameter.detach() for parameter in self.model.parameters],
            "average": self.average,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_name(f"{path.name}.part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path, setup: dict[str, Any]) -> None:
        """Take up a stored state, if there is one.

        Raises:
            ValueError: the file is of another model or of other options.
        """
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
        except Exception:  # whatever torch makes of the file
            state = {}
        if state.get("setup") != setup:
            raise ValueError(f"{path} is of another model or of other options: remove it, or take another --out")
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self.average, self.best = state["average"], state["best"]
        self._put(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
