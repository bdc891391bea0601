"""A model of Transformers with a LoRA adapter, whose prompts are prefilled by a star plan or dense.

One pass computes a context and several tails behind it. A tail is a question with its answer: it sees the whole context
and itself. So a context is computed once for all of its questions.

The context of a plan with documents is computed as the engine does it: each document at the positions behind the
anchor. The tails see its keys re-rotated to where they stand (``scheduler/planning/plan.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from starling.lab.models import ModelError, attention_by_plan, load_model, recomputed
from starling.scheduler.planning.plan import StarPlan

NAME = "starling_distilled"
NO_ROTATION = "documents need a model whose layers rotate keys by one rotary embedding with fixed frequencies"
_numbers = count()


@dataclass(frozen=True)
class Rows:
    """Rows of a forward pass.

    Attributes:
        ids: (rows,) int64 tokens: the context's, then those of each tail.
        positions: (rows,) int64, at which each is computed.
        plan: plan of the context, or None for dense attention.
        context: number of tokens of the context.
        rotate_by: (context,) int64, a token's true position minus the one where it is computed, or None if all are 0.
        tail_mask: (rows - context, rows) bool, what the tails see.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    plan: StarPlan | None
    context: int
    rotate_by: torch.Tensor | None
    tail_mask: torch.Tensor


def make_rows(context: Sequence[int], tails: Sequence[Sequence[int]], plan: StarPlan | None) -> Rows:
    """Make the rows of a context and of tails behind it.

    Args:
        plan: plan whose ``context_end`` is the context's length, without padding between documents.
    """
    length, lengths = len(context), torch.tensor([len(tail) for tail in tails])
    own = torch.arange(length)
    computed = own
    if plan is not None and (positions := plan.positions(0, length)) is not None:
        computed = torch.from_numpy(positions)
    number = torch.arange(len(tails)).repeat_interleave(lengths)
    place = torch.cat([torch.arange(int(count)) for count in lengths])
    among = (number[:, None] == number) & (place[:, None] >= place)
    return Rows(
        ids=torch.tensor([*context, *(token for tail in tails for token in tail)]),
        positions=torch.cat([computed, length + place]),
        plan=plan,
        context=length,
        rotate_by=None if computed is own else own - computed,
        tail_mask=torch.cat([torch.ones(len(number), length, dtype=torch.bool), among], 1),
    )


class AdaptedModel:
    """The model in a folder, with a new adapter, on a device.

    Args:
        dtype: dtype of the model's weights. The adapter's are float32.
        config: PEFT's configuration of the adapter.
        recompute: True if the backward pass computes each layer again: less memory, and a third more time.

    Raises:
        ModelError: Transformers can't load it, or its attention is not causal over one cache.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, config: Any, recompute: bool) -> None:
        from peft import get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.device, self.dtype = torch.device(device), dtype
        self.rows: Rows | None = None
        self.seen = torch.empty(0, 0, dtype=torch.bool)
        # For Transformers, an attention has a name and no model.
        base = load_model(folder, self.device, dtype, f"{NAME}_{next(_numbers)}", self._attend)
        self.decoder = base.get_decoder()
        self.head = base.get_output_embeddings()
        try:
            self.model: Any = get_peft_model(base, config)
        except ValueError as error:
            raise ModelError(f"{folder} gets no adapter: {error}") from None
        if dtype == torch.bfloat16:
            adapted: list[Any] = [each for each in self.model.modules() if isinstance(each, BaseTunerLayer)]
            for module in adapted:
                module.cast_input_dtype_enabled = False  # autocast casts the matrices, which are smaller
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        if recompute:
            for layer in self.decoder.layers:
                layer.forward = recomputed(layer.forward)

    def check_rotation(self) -> None:
        """Refuse a model whose keys can't be re-rotated, as documents need it.

        Raises:
            ModelError: its keys are not rotated by one rotary embedding, by angles that grow with the position.
        """
        try:
            attention = self.decoder.layers[0].self_attn
            key = torch.randn(1, 1, 3, attention.head_dim, device=self.device)
            first, then = torch.arange(3, device=self.device), torch.tensor([5, 0, 700], device=self.device)
            scale = getattr(self.decoder.rotary_emb, "attention_scaling", 1.0)
            found = self._rerotated(attention, self._rerotated(attention, key, first), then)
            right = self._rerotated(attention, key, first + then)
            moved = not torch.allclose(right, key, atol=1e-3 * scale)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ModelError(f"{NO_ROTATION}: {error}") from None
        if not (moved and torch.allclose(found, right, atol=1e-3 * scale)):
            raise ModelError(NO_ROTATION)

    def load(self, folder: Path) -> None:
        """Take the weights of the adapter in a folder, in PEFT's format, of this one's rank and layers."""
        self.model.load_adapter(str(folder), "default")

    def log_probs(self, rows: Rows, *, adapter: bool) -> torch.Tensor:
        """Return (tail rows, vocabulary) float32 log-probabilities of the token behind each row of the tails.

        Gradients are to be taken before the next pass: layers that are computed again look at ``rows``.
        """
        self.rows = rows
        with self._autocast(), nullcontext() if adapter else self.model.disable_adapter():
            logits = self.head(self._hidden(rows))
        return logits.float().log_softmax(-1)

    def answers(
        self, context: Sequence[int], questions: Sequence[Sequence[int]], tokens: int, end: int | None
    ) -> list[tuple[int, ...]]:
        """Return the base model's answer to each question behind a context, with dense attention.

        Args:
            tokens: length of an answer, which ends earlier behind an ``end`` of the model's.
        """
        rows = make_rows(context, questions, None)
        ids, positions, last = rows.ids, rows.positions, torch.tensor([*accumulate(map(len, questions))]) - 1
        last += rows.context
        seen = torch.cat([torch.ones(rows.context, len(ids), dtype=torch.bool).tril(), rows.tail_mask])
        found: list[torch.Tensor] = []
        cache, self.rows = DynamicCache(), None
        with self._autocast(), self.model.disable_adapter(), torch.inference_mode():
            for _ in range(tokens):
                self.seen = seen.to(self.device)
                hidden = self.decoder(
                    input_ids=ids[None].to(self.device),
                    position_ids=positions[None].to(self.device),
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[0]
                ids = self.head(hidden[last.to(self.device)]).argmax(-1).cpu()
                found.append(ids)
                if end is not None and bool((torch.stack(found) == end).any(0).all()):
                    break
                positions = positions[last] + 1
                seen = torch.cat([seen[last], torch.eye(len(questions), dtype=torch.bool)], 1)
                last = torch.arange(len(questions))
        whole = torch.stack(found, 1).tolist()
        return [tuple(answer[: answer.index(end) + 1] if end in answer else answer) for answer in whole]

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _hidden(self, rows: Rows) -> torch.Tensor:
        ids, positions = rows.ids[None].to(self.device), rows.positions[None].to(self.device)
        found = self.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        hidden: torch.Tensor = found[0, rows.context :]
        return hidden

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        rows = self.rows
        if options.get("softcap") or options.get("s_aux") is not None or options.get("sliding_window"):
            raise ModelError("the attention of this model has a window, a cap of its scores, or sinks")
        attend = partial(scaled_dot_product_attention, scale=options.get("scaling"), enable_gqa=True)
        if rows is None:  # it answers
            return attend(query, key, value, attn_mask=self.seen).transpose(1, 2), None
        context = rows.context
        q, k, v = (each[:, :, :context] for each in (query, key, value))
        out = [attend(q, k, v, is_causal=True) if rows.plan is None else attention_by_plan(attend, q, k, v, rows.plan)]
        if query.shape[2] > context:
            if rows.rotate_by is not None:
                key = torch.cat([self._rerotated(module, k, rows.rotate_by), key[:, :, context:]], 2)
            out.append(attend(query[:, :, context:], key, value, attn_mask=rows.tail_mask.to(query.device)))
        return torch.cat(out, 2).transpose(1, 2), None

    def _rerotated(self, module: Any, key: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Re-rotate keys, (1, KV heads, n, D), as if their tokens stood (n,) positions further behind."""
        apply: Any = sys.modules[type(module).__module__].apply_rotary_pos_emb
        cos, sin = self.decoder.rotary_emb(key, by[None].to(key.device))
        scale = getattr(self.decoder.rotary_emb, "attention_scaling", 1.0)
        rerotated: torch.Tensor = apply(key, key, cos / scale, sin / scale)[1]
        return rerotated
