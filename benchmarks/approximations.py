"""Other approximations at the same number of keys: `python -m benchmarks.approximations MODEL`.

A document of 2,048 tokens (--tokens) hides passcodes, and things whose place takes two facts to find. The document is
prefilled once with each approximation: with the model in Transformers and an explicit mask for each layer. Then each
question is answered with dense attention to the document's KV, as the query of Star Attention is. The benchmark
compares the log-probability of the right answers, how many are right, and the divergence (KL) from what dense attention
predicts there. All approximations attend to as many keys as Star Attention with eight blocks and A = B, or to a few
less. Two of them are block-sparse attention whose blocks each head chooses by content. Writes
results/approximations_NAME.json and .png, at another length than 2,048 with the length in their names. The model needs
scores of its KV heads (those that come with Starling).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer, DynamicCache

from benchmarks.chosen_blocks import CHUNK, antidiagonals, attention, mask_of
from benchmarks.report import markdown_table, numbers_table, saved_figure, write_json
from starling.attention_backends.star.model_heads import KNOWN
from starling.config.head_scores import read_scores
from starling.lab.evaluation.tasks import NEEDLE, hide
from starling.lab.evaluation.words import PLACES, distinct, number, prose, pseudo_words
from starling.lab.models import kl_at_each, load_model
from starling.lab.selftest.masks import star_mask
from starling.lab.statistics import bootstrap

TOKENS, BLOCKS, PAGE = 2048, 8, 32
CODES, MOVED = 6, 6
DENSE_HEADS = 0.1
NAME, DENSE, STAR = "approximations", "dense", "star, A = B"
COLUMNS = ("attention work", "passcodes", "two facts", "KL", "points")

Mask = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, (1, H, n, D) queries, (1, KV heads, n, D) keys) -> (n, n) or (H, n, n) bool: which keys each token sees."""


@dataclass
class MaskedAttention:
    """Attention by a mask for each layer while a document is prefilled, and dense attention otherwise.

    Attributes:
        mask: mask of the document that is prefilled, or None for dense attention.
        keys: the query-key pairs of each layer of the last document, as a mean over heads.
    """

    mask: Mask | None = None
    keys: list[int] = field(default_factory=list)

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
        if self.mask is None:
            queries, keys = query.shape[2], key.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        else:
            mask = self.mask(module.layer_idx, query, key)
            self.keys.append(int(mask.sum()) // (len(mask) if mask.dim() == 3 else 1))
        before, scale = key.shape[2] - query.shape[2], others.get("scaling")
        # torch's fused kernel of CPUs takes as many KV heads as heads, and masks of two or four dimensions
        groups = query.shape[1] // key.shape[1]
        mask = mask[None] if mask.dim() == 3 else mask
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        parts = []
        for start in range(0, query.shape[2], CHUNK):
            rows = query[:, :, start : start + CHUNK]
            end = before + start + rows.shape[2]  # no token sees those behind it
            seen = mask[..., start : start + CHUNK, :end]
            parts.append(scaled_dot_product_attention(rows, key[:, :, :end], value[:, :, :end], seen, scale=scale))
        return torch.cat(parts, 2).transpose(1, 2), None


def star_sizes(block: int, anchor: int, overlap: int, tokens: int = TOKENS) -> torch.Tensor:
    return star_mask(tokens, block_size=block, anchor_size=anchor, overlap_size=overlap, context_end=tokens)


def same_in_all_layers(mask: torch.Tensor) -> Mask:
    return lambda layer, query, key: mask


def with_dense_heads(model: str, budget: float, tokens: int) -> Mask:
    """Return the mask with a tenth of the KV heads dense.

    The blocks of the others are smaller, so that the keys are the budget's.
    """
    scores = read_scores(str(KNOWN / f"{model}.json"))
    dense = set(scores.order[: scores.count(DENSE_HEADS)])
    causal = star_sizes(tokens, tokens, 0, tokens)
    for block in range(tokens // BLOCKS, PAGE, -PAGE):
        sparse = star_sizes(block, PAGE, block - PAGE, tokens)
        share = len(dense) / scores.num_heads
        if share * causal.sum() + (1 - share) * sparse.sum() <= budget:
            break
    else:
        raise ValueError(f"{len(dense)} dense heads of {scores.num_heads} have more keys than all heads of star")

    def mask(layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        heads = [causal if (layer, head) in dense else sparse for head in range(key.shape[1])]
        return torch.stack(heads).repeat_interleave(groups, 0)

    return mask


def approximations(model: str, tokens: int = TOKENS) -> dict[str, Mask]:
    """Name -> mask.

    Args:
        model: its name, by which the scores of its heads are known.
    """
    size = tokens // BLOCKS
    star = star_sizes(size, size, 0, tokens)
    budget = float(star.sum())
    return {
        DENSE: same_in_all_layers(star_sizes(tokens, tokens, 0, tokens)),
        STAR: same_in_all_layers(star),
        "a page and overlap": same_in_all_layers(star_sizes(size, PAGE, size - PAGE, tokens)),
        "a page, overlap and dense heads": with_dense_heads(model, budget, tokens),
        "blocks by antidiagonals": mask_of(antidiagonals, budget),
        "blocks by attention": mask_of(attention, budget),
    }


@dataclass(frozen=True)
class Document:
    """A text, and (question, answer) pairs, all as token ids."""

    ids: list[int]
    questions: list[tuple[list[int], list[int]]]


def make_document(rng: Random, tokenizer: Any, tokens: int = TOKENS) -> Document:
    """Return passcodes, and things that are carried to places, in prose that fills the document."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    names = [name.capitalize() for name in pseudo_words(rng, CODES + 2 * MOVED)]
    keys, people, things = names[:CODES], names[CODES : CODES + MOVED], names[CODES + MOVED :]
    codes = distinct(rng, number, CODES)
    places = rng.sample(PLACES, MOVED)
    needles = [NEEDLE.format(key=key, value=code) for key, code in zip(keys, codes, strict=True)]
    needles += [f"{person} took the {thing} away." for person, thing in zip(people, things, strict=True)]
    rng.shuffle(needles)
    went = [f"{person} lives {place}." for person, place in zip(people, places, strict=True)]
    start = "Remember the passcodes, who took what, and who lives where: questions follow the text.\n\n"
    sentences = prose(rng, tokens // 10)
    while len(encode(start + hide(Random(0), sentences, [*needles, *went]))) > tokens:
        sentences.pop()
    ids = encode(start + hide(rng, sentences, [*needles, *went]))
    ids += encode(" " + " ".join(prose(rng, 20)))
    questions = [(f"\n\nThe passcode of {key} is", f" {code}") for key, code in zip(keys, codes, strict=True)] + [
        (f"\n\nThe {thing} is now where {person} lives, and {person} lives", f" {place}.")
        if number_of % 2
        else (f"\n\nThe one who took the {thing} away lives", f" {place}.")
        for number_of, (person, thing, place) in enumerate(zip(people, things, places, strict=True))
    ]
    return Document(ids[:tokens], [(encode(question), encode(answer)) for question, answer in questions])


@dataclass(frozen=True)
class Answer:
    """Predictions of a model at the tokens of a right answer.

    Attributes:
        predicted: (tokens, vocabulary) log-probabilities.
        logprob: mean log-probability of the answer's tokens.
        right: True if greedy decoding gives them.
    """

    predicted: torch.Tensor
    logprob: float
    right: bool

    @classmethod
    def of(cls, logits: torch.Tensor, expected: torch.Tensor) -> Answer:
        predicted = logits.float().log_softmax(-1)
        logprob = predicted[torch.arange(len(expected)), expected].mean()
        return cls(predicted, float(logprob), bool((predicted.argmax(-1) == expected).all()))

    def compared(self, dense: Answer) -> tuple[float, bool, float]:
        """Return the log-probability, whether it is right, and the divergence KL(dense || self) of a token in nats."""
        return self.logprob, self.right, float(kl_at_each(dense.predicted, self.predicted).mean())


@torch.inference_mode()
def score_document(model: Any, attention: MaskedAttention, document: Document, mask: Mask) -> tuple[list[Answer], int]:
    """Return the answers, and the query-key pairs of a layer, on average."""
    attention.mask, attention.keys = mask, []
    cache = DynamicCache(config=model.config)
    model(torch.tensor([document.ids]), past_key_values=cache, logits_to_keep=1)
    keys = round(sum(attention.keys) / len(attention.keys))
    return score_answers(model, attention, cache, document.questions), keys


@torch.inference_mode()
def score_answers(
    model: Any, attention: MaskedAttention, cache: DynamicCache, questions: Sequence[tuple[list[int], list[int]]]
) -> list[Answer]:
    """Return what the model predicts for each answer.

    Each question stands behind the tokens of the cache and sees them all, and no other question. So one call of the
    model has all questions. The cache is used up.
    """
    before = cache.get_seq_length()
    lengths = torch.tensor([len(question) + len(answer) for question, answer in questions])
    number = torch.arange(len(questions)).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(before, before + length) for length in lengths.tolist()])
    own = (number[:, None] == number) & (positions[:, None] >= positions)
    attention.mask = same_in_all_layers(torch.cat([torch.ones(len(own), before, dtype=torch.bool), own], 1))
    ids = torch.tensor([[token for question in questions for part in question for token in part]])
    logits = model(ids, position_ids=positions[None], past_key_values=cache).logits[0]
    attention.mask = None
    ends = lengths.cumsum(0).tolist()
    return [
        Answer.of(logits[end - len(answer) - 1 : end - 1], torch.tensor(answer))
        for (_, answer), end in zip(questions, ends, strict=True)
    ]


def load(path: Path) -> tuple[Any, Any, MaskedAttention]:
    """Return model, tokenizer, and the model's attention."""
    attention = MaskedAttention()
    model = load_model(path, torch.device("cpu"), torch.bfloat16, "by_mask", attention)
    return model, AutoTokenizer.from_pretrained(path), attention


def interval(differences: np.ndarray) -> list[float]:
    """Return (mean, lower, upper) over documents: a 95 % bootstrap interval, fixed seed."""
    found = bootstrap([differences.tolist()])
    return [found.mean, found.low, found.high]


def rows_of(answers: dict[str, np.ndarray], keys: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return approximation -> keys over dense's, right answers in percent, and means over documents.

    The means have intervals.

    Args:
        answers: approximation -> (documents, questions, 3), as ``Answer.compared`` gives them.
        keys: approximation -> query-key pairs of a layer.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, values in answers.items():
        over_dense = values - answers[DENSE]
        logprobs, right = over_dense[..., 0], over_dense[..., 1]
        rows[name] = {
            "keys": keys[name] / keys[DENSE],
            "right": 100 * float(values[..., 1].mean()),
            "passcodes_over_dense": interval(logprobs[:, :CODES].mean(1)),
            "two_facts_over_dense": interval(logprobs[:, CODES:].mean(1)),
            "kl": interval(values[..., 2].mean(1)),
            "points_over_dense": interval(100 * right.mean(1)),
        }
    return rows


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return a row of ``rows_of`` as texts for COLUMNS."""
    difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format
    return [
        f"{100 * row['keys']:.0f} %",
        difference(*row["passcodes_over_dense"]),
        difference(*row["two_facts_over_dense"]),
        "{:.3f} [{:.3f}, {:.3f}]".format(*row["kl"]),
        "{:+.0f} [{:+.0f}, {:+.0f}]".format(*row["points_over_dense"]),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return a table for one model; docs/star-accuracy.md says what it shows."""
    title = f"{result['model']}, {result['tokens']:,} tokens, {result['documents']} documents"
    rows = [[name, *cells_of(row)] for name, row in result["rows"].items() if name != DENSE]
    return markdown_table([title, *COLUMNS], rows)


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    names = [name for name in rows if name != DENSE]
    means, low, high = np.array([rows[name]["kl"] for name in names]).T
    with saved_figure(path, figsize=(9, 3.5)) as (_, axis):
        axis.barh(names, means, xerr=[means - low, high - means])
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel("KL from dense attention, of a token of the answer (nats)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model of Transformers")
    parser.add_argument("--documents", type=int, default=24, help="number of documents (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the documents")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a document (%(default)s)")
    args = parser.parse_args()
    model, tokenizer, attention = load(args.model)
    masks = approximations(args.model.name, args.tokens)
    rng = Random(args.seed)
    answers: dict[str, list[list[tuple[float, bool, float]]]] = {name: [] for name in masks}
    keys: dict[str, int] = {}
    for _ in track(range(args.documents), description="documents"):
        document = make_document(rng, tokenizer, args.tokens)
        found = {name: score_document(model, attention, document, mask) for name, mask in masks.items()}
        dense, _ = found[DENSE]
        for name, (scored, keys[name]) in found.items():
            answers[name].append([one.compared(other) for one, other in zip(scored, dense, strict=True)])
    rows = rows_of({name: np.asarray(values, dtype=float) for name, values in answers.items()}, keys)
    table = numbers_table(f"{args.model.name}, {args.documents} documents", ("approximation", *COLUMNS))
    for name, row in rows.items():
        table.add_row(name, *cells_of(row))
    Console(width=160).print(table)
    result = {"model": args.model.name, "documents": args.documents, "tokens": args.tokens}
    result |= {"block": args.tokens // BLOCKS, "rows": rows}
    name = f"{NAME}_{args.model.name}" + (f"_{args.tokens}" if args.tokens != TOKENS else "")
    path = write_json(name, result)
    plot(rows, path.with_suffix(".png"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
