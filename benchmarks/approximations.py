"""Other approximations than Star Attention, at the same number of keys: `python -m benchmarks.approximations MODEL`.

A document of 2,048 tokens hides passcodes, and things whose place takes two facts to find. The document is prefilled
once with each approximation: with the model in Transformers and an explicit mask for each layer. Then each question is
answered with dense attention to the document's KV, as the query of Star Attention is. The benchmark compares the
log-probability of the right answers. All approximations attend to as many keys as Star Attention with eight blocks and
A = B, or to a few less. Writes results/approximations_NAME.json and .png. Takes 40 minutes with the model of
`make eval-model` on one core, 12 with the demo model.
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

from benchmarks.report import markdown_table, numbers_table, saved_figure, write_json
from starling.attention_backends.star.reference import star_mask
from starling.lab.evaluation.tasks.base import hide
from starling.lab.evaluation.tasks.needles import NEEDLE
from starling.lab.evaluation.tasks.words import PLACES, distinct, number, prose, pseudo_words
from starling.lab.models import load_model
from starling.lab.statistics import bootstrap, mean_ratio

TOKENS, BLOCK, PAGE = 2048, 256, 32
CODES, MOVED = 6, 6
DENSE_LAYERS = 3
CHOSEN_PAGES = 3
NAME, DENSE, STAR = "approximations", "dense", "star, A = B"

Mask = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, (1, H, n, D) queries, (1, KV heads, n, D) keys) -> (n, n) bool: which keys each token sees."""


@dataclass
class MaskedAttention:
    """Attention by a mask for each layer while a document is prefilled, and dense attention otherwise.

    Attributes:
        mask: of the document that is prefilled; None: dense.
        keys: the query-key pairs of each layer of the last document.
    """

    mask: Mask | None = None
    keys: list[int] = field(default_factory=list)

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
        if self.mask is None:
            queries, keys = query.shape[2], key.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        else:
            mask = self.mask(module.layer_idx, query, key)
            self.keys.append(int(mask.sum()))
        scale = others.get("scaling")
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None


def star_sizes(block: int, anchor: int, overlap: int) -> torch.Tensor:
    return star_mask(TOKENS, block_size=block, anchor_size=anchor, overlap_size=overlap, context_end=TOKENS)


def same_in_all_layers(mask: torch.Tensor) -> Mask:
    return lambda layer, query, key: mask


def with_dense_layers(overlap: bool, num_layers: int, budget: float) -> Mask:
    """A few layers in the middle are dense; the blocks of the others are smaller, so that the keys are the budget's."""
    first = (num_layers - DENSE_LAYERS) // 2
    causal = star_sizes(TOKENS, TOKENS, 0)
    for block in range(BLOCK, 0, -PAGE):
        mask = star_sizes(block, PAGE, block - PAGE) if overlap else star_sizes(block, block, 0)
        keys = (DENSE_LAYERS * causal.sum() + (num_layers - DENSE_LAYERS) * mask.sum()) / num_layers
        if keys <= budget:
            return lambda layer, query, key: causal if first <= layer < first + DENSE_LAYERS else mask
    raise ValueError(f"{DENSE_LAYERS} dense layers of {num_layers} have more keys than all layers of star")


def with_chosen_pages(layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """One anchor page, a smaller overlap, and for each block the earlier pages whose mean key fits its mean query."""
    overlap = BLOCK - (1 + CHOSEN_PAGES) * PAGE
    mask = star_sizes(BLOCK, PAGE, overlap)
    groups = query.shape[1] // key.shape[1]
    pages = key[0].unflatten(1, (-1, PAGE)).mean(2).repeat_interleave(groups, 0)
    blocks = query[0].unflatten(1, (-1, BLOCK)).mean(2)
    scores = torch.einsum("hbd,hpd->bp", blocks.float(), pages.float())
    for block in range(1, TOKENS // BLOCK):
        own = block * BLOCK
        seen = (own - overlap) // PAGE
        for page in scores[block, 1:seen].topk(min(CHOSEN_PAGES, max(seen - 1, 0))).indices.tolist():
            mask[own : own + BLOCK, (1 + page) * PAGE : (2 + page) * PAGE] = True
    return mask


def approximations(num_layers: int) -> dict[str, Mask]:
    """Name -> mask."""
    star = star_sizes(BLOCK, BLOCK, 0)
    budget = float(star.sum())
    return {
        DENSE: same_in_all_layers(star_sizes(TOKENS, TOKENS, 0)),
        STAR: same_in_all_layers(star),
        "a page and overlap": same_in_all_layers(star_sizes(BLOCK, PAGE, BLOCK - PAGE)),
        "half an anchor and half an overlap": same_in_all_layers(star_sizes(BLOCK, BLOCK // 2, BLOCK // 2)),
        "star, 3 dense layers": with_dense_layers(False, num_layers, budget),
        "overlap, 3 dense layers": with_dense_layers(True, num_layers, budget),
        "overlap, chosen pages": with_chosen_pages,
    }


@dataclass(frozen=True)
class Document:
    """A text of TOKENS tokens, and (question, answer) pairs, all as token ids."""

    ids: list[int]
    questions: list[tuple[list[int], list[int]]]


def make_document(rng: Random, tokenizer: Any) -> Document:
    """Passcodes, and things that are carried to places, in prose that fills the document."""

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
    sentences = prose(rng, 200)
    while len(encode(start + hide(Random(0), sentences, [*needles, *went]))) > TOKENS:
        sentences.pop()
    ids = encode(start + hide(rng, sentences, [*needles, *went]))
    ids += encode(" " + " ".join(prose(rng, 20)))
    questions = [(f"\n\nThe passcode of {key} is", f" {code}") for key, code in zip(keys, codes, strict=True)] + [
        (f"\n\nThe {thing} is now where {person} lives, and {person} lives", f" {place}.")
        if number_of % 2
        else (f"\n\nThe one who took the {thing} away lives", f" {place}.")
        for number_of, (person, thing, place) in enumerate(zip(people, things, places, strict=True))
    ]
    return Document(ids[:TOKENS], [(encode(question), encode(answer)) for question, answer in questions])


@torch.inference_mode()
def answer_logprobs(model: Any, attention: MaskedAttention, document: Document, mask: Mask) -> tuple[list[float], int]:
    """The mean log-probability of each answer's tokens, and the query-key pairs of a layer, on average."""
    attention.mask, attention.keys = mask, []
    cache = DynamicCache(config=model.config)
    model(torch.tensor([document.ids]), past_key_values=cache, logits_to_keep=1)
    keys = round(sum(attention.keys) / len(attention.keys))
    return [logprob for logprob, _ in score_answers(model, attention, cache, document.questions)], keys


@torch.inference_mode()
def score_answers(
    model: Any, attention: MaskedAttention, cache: DynamicCache, questions: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """For each answer, the mean log-probability of its tokens, and whether greedy decoding gives them.

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
    scores = []
    for (_, answer), end in zip(questions, lengths.cumsum(0).tolist(), strict=True):
        expected, rows = torch.tensor(answer), logits[end - len(answer) - 1 : end - 1].float().log_softmax(-1)
        logprob = rows[torch.arange(len(answer)), expected].mean()
        scores.append((float(logprob), bool((rows.argmax(-1) == expected).all())))
    return scores


def load(path: Path) -> tuple[Any, Any, MaskedAttention]:
    """Model, tokenizer, and the model's attention."""
    attention = MaskedAttention()
    model = load_model(path, torch.device("cpu"), torch.bfloat16, "by_mask", attention)
    return model, AutoTokenizer.from_pretrained(path), attention


def interval(differences: np.ndarray) -> list[float]:
    """(mean, lower, upper) over documents: a 95 % bootstrap interval, fixed seed."""
    found = bootstrap([differences.tolist()])
    return [found.mean, found.low, found.high]


def rows_of(logprobs: dict[str, np.ndarray], keys: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Approximation -> keys over dense's, and the answers' log-probability over dense's, for both kinds of question.

    Args:
        logprobs: approximation -> (documents, questions).
        keys: approximation -> query-key pairs of a layer.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, values in logprobs.items():
        loss, star_loss = ((logprobs[DENSE] - other).mean(1) for other in (values, logprobs[STAR]))
        codes, moved = ((values - logprobs[DENSE])[:, part].mean(1) for part in (slice(CODES), slice(CODES, None)))
        rows[name] = {
            "keys": keys[name] / keys[DENSE],
            "over_dense": interval(-loss),
            "passcodes_over_dense": interval(codes),
            "two_facts_over_dense": interval(moved),
            "loss_over_stars": mean_ratio(loss, star_loss),
        }
    return rows


def shown(values: list[float]) -> str:
    """(mean, lower, upper) as text."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def markdown(result: dict[str, Any]) -> str:
    """A table for one model; docs/star-accuracy.md says what it shows."""
    title = f"{result['model']}, {result['documents']} documents"
    rows = []
    for name, row in result["rows"].items():
        if name != DENSE:
            intervals = (row["passcodes_over_dense"], row["two_facts_over_dense"], row["over_dense"])
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*row["loss_over_stars"])
            rows.append([name, f"{100 * row['keys']:.0f} %", *map(shown, intervals), ratio])
    return markdown_table([title, "attention work", "passcodes", "two facts", "both", "loss over star's"], rows)


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    names = [name for name in rows if name != DENSE]
    means, low, high = np.array([rows[name]["over_dense"] for name in names]).T
    with saved_figure(path, figsize=(9, 3.5)) as (_, axis):
        axis.barh(names, means, xerr=[means - low, high - means])
        axis.axvline(0, color="black", linewidth=0.5)
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel("log-probability of a token of the answer, over dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model of Transformers")
    parser.add_argument("--documents", type=int, default=24, help="number of documents (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the documents")
    args = parser.parse_args()
    model, tokenizer, attention = load(args.model)
    masks = approximations(model.config.num_hidden_layers)
    rng = Random(args.seed)
    logprobs: dict[str, list[list[float]]] = {name: [] for name in masks}
    keys: dict[str, int] = {}
    for _ in track(range(args.documents), description="documents"):
        document = make_document(rng, tokenizer)
        for name, mask in masks.items():
            values, keys[name] = answer_logprobs(model, attention, document, mask)
            logprobs[name].append(values)
    rows = rows_of({name: np.asarray(values) for name, values in logprobs.items()}, keys)
    columns = ("approximation", "keys", "over dense [95 %]", "passcodes", "two facts", "loss over star's [95 %]")
    table = numbers_table(
        f"{args.model.name}: log-probability of a token of the answer, {args.documents} documents", columns
    )
    for name, row in rows.items():
        intervals = (row["over_dense"], row["passcodes_over_dense"], row["two_facts_over_dense"])
        ratio = "" if name == DENSE else shown(row["loss_over_stars"])
        table.add_row(name, f"{row['keys']:.1%}", *map(shown, intervals), ratio)
    Console(width=160).print(table)
    result = {"model": args.model.name, "documents": args.documents, "tokens": TOKENS, "block": BLOCK, "rows": rows}
    name = f"{NAME}_{args.model.name}"
    path = write_json(name, result)
    plot(rows, path.with_suffix(".png"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
