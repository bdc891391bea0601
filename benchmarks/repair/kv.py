"""The KV of a prompt's documents: dense, by themselves, and with chosen tokens computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.anchors import Layers
from benchmarks.approximations import Mask, MaskedAttention, same_in_all_layers
from starling.attention_backends.star.reference import Heads, head_masks
from starling.lab.evaluation.document_prompts import DocumentPrompt


@dataclass(frozen=True)
class Answered:
    """What came of one pass over chosen tokens, question and answer.

    Attributes:
        logprobs: (answer tokens, vocabulary) log-probabilities of each token of the answer, behind the right ones.
        layers: the context's KV, with the chosen tokens' new one.
        attention: (layers, KV heads, context tokens) the mean attention of the question's tokens to each token.
    """

    logprobs: torch.Tensor
    layers: Layers
    attention: torch.Tensor


@torch.inference_mode()
def computed(
    model: Any, attention: MaskedAttention, ids: Sequence[int], positions: torch.Tensor, seen: Layers, mask: Mask
) -> tuple[torch.Tensor, Layers]:
    """The last hidden states of tokens, (n, hidden size), and their keys and values.

    Args:
        positions: (n,) of the tokens.
        seen: KV of other tokens.
        mask: (n, other tokens + n), or one for each query head.
    """
    cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(seen):
        cache.update(keys, values, number)
    before = cache.get_seq_length()
    attention.mask = mask
    hidden = model.model(torch.tensor([ids]), position_ids=positions[None], past_key_values=cache).last_hidden_state[0]
    attention.mask = None
    return hidden, [(layer.keys[:, :, before:], layer.values[:, :, before:]) for layer in cache.layers]


def turned(model: Any, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Keys as if their tokens stood elsewhere: a rotary embedding turns a key by its position.

    Args:
        keys: (1, KV heads, n, D).
        by: (n,) the new position less the old one.
    """
    cos, sin = model.model.rotary_emb(keys.float(), by[None])
    found: torch.Tensor = apply_rotary_pos_emb(keys.float(), keys.float(), cos, sin)[0]
    return found.to(keys.dtype)


def dense_kv(model: Any, attention: MaskedAttention, prompt: DocumentPrompt) -> Layers:
    """Every token of the context sees all before it."""
    ids = prompt.context
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return computed(model, attention, ids, torch.arange(len(ids)), [], same_in_all_layers(mask))[1]


def document_numbers(prompt: DocumentPrompt) -> torch.Tensor:
    """(context tokens,) 0 for the head's tokens, and 1, 2, ... for those of each document."""
    lengths = torch.tensor([len(prompt.head), *map(len, prompt.documents)])
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def document_mask(prompt: DocumentPrompt) -> torch.Tensor:
    """(n, n) bool: a document sees the head and itself."""
    number, places = document_numbers(prompt), torch.arange(len(prompt.context))
    return (places[:, None] >= places) & ((number[:, None] == number) | (number == 0))


def document_kv(model: Any, attention: MaskedAttention, prompt: DocumentPrompt) -> Layers:
    """Each document by itself: computed right behind the head, and its keys turned to where it stands."""
    ids, places = prompt.context, torch.arange(len(prompt.context))
    own = torch.cat([places[: len(prompt.head)], *(len(prompt.head) + torch.arange(len(d)) for d in prompt.documents)])
    _, layers = computed(model, attention, ids, own, [], same_in_all_layers(document_mask(prompt)))
    return [(turned(model, keys, places - own), values) for keys, values in layers]


def dense_heads_kv(model: Any, attention: MaskedAttention, prompt: DocumentPrompt, dense: Heads) -> Layers:
    """Documents whose dense heads see all before them. They are computed where they stand."""
    ids, heads = prompt.context, model.config.num_key_value_heads
    groups, mask = model.config.num_attention_heads // heads, document_mask(prompt)

    def of_layer(layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        of_heads = head_masks(mask, heads, {head for number, head in dense if number == layer})
        return of_heads.repeat_interleave(groups, 0)

    return computed(model, attention, ids, torch.arange(len(ids)), [], of_layer)[1]


def answered(
    model: Any, attention: MaskedAttention, prompt: DocumentPrompt, layers: Layers, chosen: torch.Tensor
) -> Answered:
    """Compute the chosen tokens of the context again, then the question and its answer. All see all before them.

    Args:
        layers: the context's KV.
        chosen: (context tokens,) bool. A token sees the new KV of these, and ``layers`` of the others.
    """
    length, places = len(prompt.context), chosen.nonzero()[:, 0]
    asked = [*prompt.question, *prompt.answer[:-1]]
    ids = [*torch.tensor(prompt.context)[places].tolist(), *asked]
    positions = torch.cat([places, torch.arange(length, length + len(asked))])
    old = ~chosen & (torch.arange(length) <= positions[:, None])
    mask = torch.cat([old, positions <= positions[:, None]], 1)
    question = slice(len(places), len(places) + len(prompt.question))
    weights: list[torch.Tensor] = []

    def noted(layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        weights.append(question_weights(query[0, :, question], key[0], mask[question]))
        return mask

    hidden, new = computed(model, attention, ids, positions, layers, noted)
    found = torch.stack(weights)
    found[..., places] = found[..., length : length + len(places)]
    with torch.inference_mode():
        logprobs = model.lm_head(hidden[-len(prompt.answer) :]).float().log_softmax(-1)
    return Answered(logprobs, replaced(layers, new, places), found[..., :length])


def question_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(KV heads, n) the attention to each key, as the mean of a KV head's queries.

    Args:
        query: (H, m, D).
        key: (KV heads, n, D).
        mask: (m, n) bool.
    """
    grouped = query.float().unflatten(0, (len(key), -1))
    scores = grouped @ key.float()[:, None].mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).mean((1, 2))


def replaced(layers: Layers, new: Layers, places: torch.Tensor) -> Layers:
    """The KV of ``layers`` with the first tokens of ``new`` at these places."""

    def put(old: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        return old.index_copy(2, places, fresh[:, :, : len(places)])

    return [
        (put(keys, new_keys), put(values, new_values))
        for (keys, values), (new_keys, new_values) in zip(layers, new, strict=True)
    ]


def deviation(layers: Layers, dense: Layers) -> torch.Tensor:
    """(layers, tokens) how far keys and values are from the dense ones: squared, over the dense ones' mean square."""

    def of(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (found - right).float().square().sum((0, 1, 3)) / right.float().square().sum((0, 1, 3)).mean()

    return torch.stack(
        [of(keys, right[0]) + of(values, right[1]) for (keys, values), right in zip(layers, dense, strict=True)]
    )
