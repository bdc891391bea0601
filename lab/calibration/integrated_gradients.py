"""The score of each KV head: its share of the divergence between dense and star, by integrated gradients.

f(g) is KL(dense model, gated model) at the first tokens of the answer, with a gate g for each KV head. On the straight
line from star (all gates 0) to dense (all 1), a head's score is -df/dg averaged over a few points (integrated
gradients, arXiv 1703.01365). The scores of a prompt sum to f(0), the whole divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from starling.lab.calibration.gated_model import GatedModel
from starling.lab.models import kl_at_each
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.sizes import default_anchor_size

ANSWER_TOKENS = 4
PAGE = 32
MIN_BLOCK = 2 * PAGE


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt with the answer at which models are compared.

    Attributes:
        name: unique among the prompts.
        token_ids: of the prompt.
        answer_ids: the first tokens of the answer; none: those that the dense model gives.
    """

    name: str
    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def make_plan(num_tokens: int, blocks: int, query_tokens: int) -> StarPlan:
    """The plan with the default anchor and overlap, and blocks of a share of the prompt, at least two pages."""
    block_size = max(num_tokens // blocks // PAGE * PAGE, MIN_BLOCK)
    anchor = default_anchor_size(block_size, PAGE)
    context_end = max(num_tokens - query_tokens, 1)
    return StarPlan(block_size, anchor, block_size - anchor, context_end, num_tokens)


class Case:
    """One prompt with its answer on a model, and the dense model's log-probabilities there.

    Args:
        blocks: into which the prompt is cut.
        query_tokens: at its end, which see the whole prompt.
    """

    def __init__(self, model: GatedModel, prompt: ScoredPrompt, blocks: int, query_tokens: int) -> None:
        self.model, ids = model, list(prompt.token_ids)
        self.plan = make_plan(len(ids), blocks, query_tokens)
        answer = list(prompt.answer_ids[:ANSWER_TOKENS]) or self._answer_of_model(ids)
        self.ids, self.places = [*ids, *answer[:-1]], len(answer)
        with torch.no_grad():
            self.dense = model.log_probs(self.ids, self.places, None, None)

    def _answer_of_model(self, ids: list[int]) -> list[int]:
        answer: list[int] = []
        with torch.no_grad():
            for _ in range(ANSWER_TOKENS):
                answer.append(int(self.model.log_probs([*ids, *answer], 1, None, None).argmax()))
        return answer

    def divergence(self, gates: torch.Tensor) -> torch.Tensor:
        """KL(dense, gated) for (layers, KV heads) gates."""
        return kl_at_each(self.dense, self.model.log_probs(self.ids, self.places, gates, self.plan)).mean()

    def scores(self, steps: int) -> torch.Tensor:
        """(layers, KV heads) float32: what each head carries of the divergence of star."""
        total = torch.zeros(self.model.num_layers, self.model.num_kv_heads)
        for step in range(steps):
            gates = torch.full_like(total, (step + 0.5) / steps, requires_grad=True)
            self.divergence(gates).backward()
            if gates.grad is not None:
                total -= gates.grad / steps
        return total

    def divergences(self, order: Sequence[tuple[int, int]], counts: Sequence[int]) -> Iterator[float]:
        """KL(dense, plan) with so many of the first heads of ``order`` dense, for each of ``counts``."""
        for count in counts:
            gates = torch.zeros(self.model.num_layers, self.model.num_kv_heads)
            for layer, head in order[:count]:
                gates[layer, head] = 1
            with torch.no_grad():
                yield float(self.divergence(gates))
