"""Transformers model for `starling calibrate`, with heads mixed between dense and star, and the heads' scores.

A gate g for each KV head makes its output g * dense + (1 - g) * star. With all gates at 1 the model is dense, at 0 it
is prefilled by a star plan. Gates of 0 and 1 are a plan with dense heads.

f(g) is KL(dense model, gated model) at the first tokens of the answer. On the straight line from star (all gates 0) to
dense (all 1), a head's score is -df/dg averaged over a few points (integrated gradients, arXiv 1703.01365). The scores
of a prompt sum to f(0), the whole divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from starling.lab.models import Attend, ModelError, attention_by_plan, kl_at_each, load_model, recomputed
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.sizes import default_anchor_size

NAME = "starling_gated"
Gate = torch.Tensor | None
ANSWER_TOKENS = 4
PAGE = 32
MIN_BLOCK = 2 * PAGE


@dataclass
class Gates:
    """Attention of the heads in a forward pass.

    Attributes:
        gates: (layers, KV heads), 1 for dense; or None if all are dense.
        plan: plan whose blocks the others see.
    """

    gates: Gate = None
    plan: StarPlan | None = None


class GatedModel:
    """The model in a folder, on a device.

    Args:
        dtype: dtype of its weights and of the computation.

    Raises:
        ModelError: Transformers can't load it, or its attention is not causal over one cache.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.device, self.state = torch.device(device), Gates()
        self.model = load_model(folder, self.device, dtype, NAME, self._attend)
        self.is_full, self.num_kv_heads = layers_of(self.model.config)
        self.num_layers = len(self.is_full)
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention"}:
            names = ", ".join(sorted(kinds))
            raise ModelError(f"{folder} has layers of the kinds {names}, not all attention")
        for layer in self.model.get_decoder().layers:
            layer.forward = recomputed(layer.forward)

    def log_probs(self, token_ids: Sequence[int], last: int, gates: Gate, plan: StarPlan | None) -> torch.Tensor:
        """Return (last, vocabulary) float32 log-probabilities at the last tokens' places and behind the very last one.

        Args:
            token_ids: tokens of the prompt, and behind it tokens of the answer.
            gates, plan: the fields of ``Gates``.
        """
        self.state = Gates(gates, plan)
        ids = torch.tensor([list(token_ids)], device=self.device)
        logits = self.model(ids, logits_to_keep=last, use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        gates, plan, layer = self.state.gates, self.state.plan, module.layer_idx
        scale, window = options.get("scaling"), options.get("sliding_window")
        if options.get("softcap") or options.get("s_aux") is not None:
            raise ModelError("the attention of this model has a cap of its scores, or sinks")
        attend = partial(scaled_dot_product_attention, scale=scale, enable_gqa=True)
        if window is not None or not self.is_full[layer]:
            return attend(query, key, value, attn_mask=mask, is_causal=mask is None).transpose(1, 2), None
        if gates is None or plan is None:
            return attend(query, key, value, is_causal=True).transpose(1, 2), None
        gate, group = gates[layer].to(query.device), query.shape[1] // key.shape[1]
        if not gate.requires_grad and bool(((gate == 0) | (gate == 1)).all()):
            return _by_kind(attend, query, key, value, gate == 1, plan).transpose(1, 2), None
        weight = gate.repeat_interleave(group)[None, :, None, None].to(query.dtype)
        dense = attend(query, key, value, is_causal=True)
        return (weight * dense + (1 - weight) * attention_by_plan(attend, query, key, value, plan)).transpose(
            1, 2
        ), None


def layers_of(config: Any) -> tuple[list[bool], int]:
    """Return, for each layer of Transformers' config, whether it is full attention, and the KV heads of a layer.

    Raises:
        ModelError: no layer is full attention.
    """
    text = config.get_text_config()
    kind = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    kinds = getattr(text, "layer_types", None) or [kind] * text.num_hidden_layers
    is_full = [kind == "full_attention" for kind in kinds]
    if not any(is_full):
        raise ModelError(f"the model has no layers of full attention, but {', '.join(sorted(set(kinds)))}")
    shared = 1 if getattr(text, "multi_query", False) else getattr(text, "multi_query_group_num", None)
    return is_full, getattr(text, "num_key_value_heads", None) or shared or text.num_attention_heads


def _by_kind(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_dense: torch.Tensor,
    plan: StarPlan,
) -> torch.Tensor:
    """Compute attention in which each KV head is dense or star; no head is computed twice."""
    out, group = torch.empty_like(query), query.shape[1] // key.shape[1]
    for dense in (True, False):
        heads = torch.nonzero(is_dense == dense)[:, 0]
        if len(heads):
            of_query = (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
            operands = query[:, of_query], key[:, heads], value[:, heads]
            out[:, of_query] = (
                attend(*operands, is_causal=True) if dense else attention_by_plan(attend, *operands, plan)
            )
    return out


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt with the answer at which models are compared.

    Attributes:
        name: name that is unique among the prompts.
        token_ids: tokens of the prompt.
        answer_ids: the first tokens of the answer; if empty, those that the dense model gives.
    """

    name: str
    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def make_plan(num_tokens: int, blocks: int, query_tokens: int) -> StarPlan:
    """Make the plan with the default anchor and overlap, and blocks of a share of the prompt, at least two pages."""
    block_size = max(num_tokens // blocks // PAGE * PAGE, MIN_BLOCK)
    anchor = default_anchor_size(block_size, PAGE)
    context_end = max(num_tokens - query_tokens, 1)
    return StarPlan(block_size, anchor, block_size - anchor, context_end, num_tokens)


class Case:
    """One prompt with its answer on a model, and the dense model's log-probabilities there.

    Args:
        blocks: number of blocks of the prompt.
        query_tokens: tokens at its end, which see the whole prompt.
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
        """Return KL(dense, gated) for (layers, KV heads) gates."""
        return kl_at_each(self.dense, self.model.log_probs(self.ids, self.places, gates, self.plan)).mean()

    def scores(self, steps: int) -> torch.Tensor:
        """Return (layers, KV heads) float32: what each head carries of the divergence of star."""
        total = torch.zeros(self.model.num_layers, self.model.num_kv_heads)
        for step in range(steps):
            gates = torch.full_like(total, (step + 0.5) / steps, requires_grad=True)
            self.divergence(gates).backward()
            if gates.grad is not None:
                total -= gates.grad / steps
        return total

    def divergences(self, order: Sequence[tuple[int, int]], counts: Sequence[int]) -> Iterator[float]:
        """Return KL(dense, plan) for each of ``counts``, the number of the first heads of ``order`` that are dense."""
        for count in counts:
            gates = torch.zeros(self.model.num_layers, self.model.num_kv_heads)
            for layer, head in order[:count]:
                gates[layer, head] = 1
            with torch.no_grad():
                yield float(self.divergence(gates))
