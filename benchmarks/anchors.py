"""Which part of the anchor matters, and the question beside it: `python -m benchmarks.anchors MODEL`.

The ablation of Star Attention's paper (arXiv 2411.17116, section 4.2, table 3) on the documents and questions of
`benchmarks.approximations`: each block behind the first is prefilled behind other tokens than the anchor, or behind the
anchor at other positions. These tokens are left out of the KV that questions are answered with, as the paper's anchors
are. And blocks that also see the question, which have to be prefilled for each question anew. Writes
results/anchors_NAME.json and .png. Takes 40 minutes with the model of `make eval-model` on one core, 15 with the demo
model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.progress import track
from transformers import DynamicCache

from benchmarks.approximations import (
    BLOCK,
    CODES,
    DENSE,
    PAGE,
    STAR,
    TOKENS,
    Document,
    MaskedAttention,
    interval,
    load,
    make_document,
    plot,
    score_answers,
    shown,
)
from benchmarks.report import markdown_table, write_json

NAME = "anchors"
ASKED = slice(0, None, 3)
"""The questions of a document for which it is prefilled anew: two of each kind."""

CONSTANT = " the"
OVERLAP = "a page and overlap"
PAPER = {
    DENSE: 99.50,
    STAR: 97.61,
    "anchor at the positions of the block before": 97.35,
    "anchor at random positions": 96.79,
    "the block before as anchor, at its positions": 94.20,
    "the anchor's tokens shuffled": 92.96,
    "random tokens": 90.55,
    "no anchor": 60.11,
    "one token repeated": 0.00,
}
"""Accuracy of the paper's needles, in %: Llama-3.1-8B-Instruct, 64k tokens, n/4 (table 3)."""

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (1, KV heads, n, D); keys are turned by their positions."""


@dataclass(frozen=True)
class Front:
    """What a block sees in front of its own tokens.

    Attributes:
        ids, positions: tokens that are prefilled by themselves, at these positions.
        overlap: so many last tokens of the block before, as they were prefilled.
    """

    ids: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    overlap: int = 0


FrontOf = Callable[[int], Front]
"""Position of a block's first token, not 0 -> what the block sees in front of its own tokens."""


def everything(start: int) -> Front:
    """All blocks before: dense attention."""
    return Front(overlap=start)


def anchor_variants(ids: Sequence[int], constant: int, vocabulary: int, rng: Random) -> dict[str, FrontOf]:
    """Name -> what the blocks of a document see, all with as many tokens as a block, or none.

    Args:
        ids: of the document.
        constant: the token that is repeated.
        vocabulary: number of tokens to draw random ones from.
    """
    first, places = tuple(ids[:BLOCK]), tuple(range(BLOCK))
    shuffled = tuple(rng.sample(first, BLOCK))
    noise = tuple(rng.randrange(vocabulary) for _ in range(BLOCK))
    drawn = {start: tuple(sorted(rng.sample(range(start), BLOCK))) for start in range(BLOCK, len(ids), BLOCK)}
    return {
        STAR: lambda start: Front(first, places),
        "anchor at the positions of the block before": lambda start: Front(first, tuple(range(start - BLOCK, start))),
        "anchor at random positions": lambda start: Front(first, drawn[start]),
        "the block before as anchor, at its positions": lambda start: Front(
            tuple(ids[start - BLOCK : start]), tuple(range(start - BLOCK, start))
        ),
        "the block before as anchor, at the anchor's positions": lambda start: Front(
            tuple(ids[start - BLOCK : start]), places
        ),
        "the anchor's tokens shuffled": lambda start: Front(shuffled, places),
        "random tokens": lambda start: Front(noise, places),
        "no anchor": lambda start: Front(),
        "one token repeated": lambda start: Front((constant,) * BLOCK, places),
        OVERLAP: lambda start: Front(first[:PAGE], places[:PAGE], BLOCK - PAGE),
    }


def question_variants(ids: Sequence[int], question: Sequence[int]) -> dict[str, FrontOf]:
    """Name -> what blocks see, the question's tokens among it, behind the anchor; no more tokens than a block has."""

    def beside(anchor: int, overlap: int) -> Front:
        behind = range(anchor, anchor + len(question))
        return Front((*ids[:anchor], *question), (*range(anchor), *behind), overlap)

    pages = -(-len(question) // PAGE) * PAGE
    return {
        "anchor and question": lambda start: beside(BLOCK - pages, 0),
        "a page, question and overlap": lambda start: beside(PAGE, BLOCK - PAGE - pages),
    }


def layers_of(model: Any, ids: Sequence[int], positions: Sequence[int], seen: Sequence[Layers]) -> Layers:
    """Keys and values of tokens that see one another causally, and all of ``seen``."""
    cache = DynamicCache(config=model.config)
    for layers in seen:
        for number, (keys, values) in enumerate(layers):
            cache.update(keys, values, number)
    before = cache.get_seq_length()
    model(torch.tensor([ids]), position_ids=torch.tensor([positions]), past_key_values=cache, logits_to_keep=1)
    return [(layer.keys[:, :, before:], layer.values[:, :, before:]) for layer in cache.layers]


@torch.inference_mode()
def prefill(model: Any, ids: Sequence[int], front_of: FrontOf, known: dict[Front, Layers]) -> DynamicCache:
    """The KV of a document's tokens, without what stood in front of its blocks.

    Args:
        known: fronts that were prefilled; gets the new ones.
    """
    cache = DynamicCache(config=model.config)
    for start in range(0, len(ids), BLOCK):
        seen: list[Layers] = []
        if start:
            front = front_of(start)
            alone = Front(front.ids, front.positions)
            if front.ids and alone not in known:
                known[alone] = layers_of(model, front.ids, front.positions, [])
            seen += [known[alone]] if front.ids else []
            end = start - front.overlap
            seen += [[(layer.keys[:, :, end:], layer.values[:, :, end:]) for layer in cache.layers]]
        block = ids[start : start + BLOCK]
        for number, (keys, values) in enumerate(layers_of(model, block, range(start, start + len(block)), seen)):
            cache.update(keys, values, number)
    return cache


Scores = dict[str, list[tuple[float, bool]]]
"""Variant -> for each question, the answer's log-probability and whether it is right."""


def measure_anchors(model: Any, tokenizer: Any, attention: MaskedAttention, document: Document, rng: Random) -> Scores:
    """Dense attention and all variants of the anchor on one document."""
    (constant,) = tokenizer(CONSTANT, add_special_tokens=False)["input_ids"]
    known: dict[Front, Layers] = {}
    scores: Scores = {}
    variants = anchor_variants(document.ids, constant, len(tokenizer), rng)
    for name, front_of in {DENSE: everything, **variants}.items():
        cache = prefill(model, document.ids, front_of, known)
        scores[name] = score_answers(model, attention, cache, document.questions)
    return scores


def measure_questions(model: Any, attention: MaskedAttention, document: Document) -> Scores:
    """The variants that see the question on one document, for ASKED of its questions."""
    scores: Scores = {}
    for question, answer in document.questions[ASKED]:
        known: dict[Front, Layers] = {}
        for name, front_of in question_variants(document.ids, question).items():
            cache = prefill(model, document.ids, front_of, known)
            scores.setdefault(name, []).extend(score_answers(model, attention, cache, [(question, answer)]))
    return scores


def rows_of(documents: Sequence[Scores], codes: int = CODES) -> dict[str, dict[str, Any]]:
    """Variant -> [mean, lower, upper] of the answers' log-probability, and how many passcodes are found.

    Args:
        documents: scores of each.
        codes: how many of the questions ask for passcodes; they come first.
    """
    values = {name: np.array([scores[name] for scores in documents], dtype=float) for name in documents[0]}
    logprobs = {name: found[:, :, 0] for name, found in values.items()}
    return {
        name: {
            "passcodes_found": float(values[name][:, :codes, 1].mean()),
            "passcodes_over_dense": interval((found - logprobs[DENSE])[:, :codes].mean(1)),
            "two_facts_over_dense": interval((found - logprobs[DENSE])[:, codes:].mean(1)),
            "over_dense": interval((found - logprobs[DENSE]).mean(1)),
            "over_star": interval((found - logprobs[STAR]).mean(1)),
            "over_overlap": interval((found - logprobs[OVERLAP]).mean(1)),
        }
        for name, found in logprobs.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """Two tables for one model; docs/star-accuracy.md says what they show."""

    def cells(name: str, row: dict[str, Any], **more: str) -> list[str]:
        """A text for each interval; empty where a variant would be compared with itself."""
        same = {"passcodes_over_dense": DENSE, "two_facts_over_dense": DENSE, "over_star": STAR} | more
        found = f"{100 * row['passcodes_found']:.0f} %"
        return [found, *("" if name == other else shown(row[field]) for field, other in same.items())]

    def papers(name: str) -> str:
        return f"{PAPER[name]:.1f} %" if name in PAPER else ""

    columns = ["found", "passcodes", "two facts", "both, over A = B"]
    first = markdown_table(
        [f"{result['model']}, {result['documents']} documents", "paper", *columns],
        [[name, papers(name), *cells(name, row)] for name, row in result["rows"].items()],
    )
    second = markdown_table(
        [f"{result['model']}, {result['question_documents']} documents", *columns, "both, over overlap"],
        [[name, *cells(name, row, over_overlap=OVERLAP)] for name, row in result["question_rows"].items()],
    )
    return f"{first}\n\n{second}"


def result_of(model: str, anchors: Sequence[Scores], questions: Sequence[Scores]) -> dict[str, Any]:
    """The stored result.

    Args:
        model: its name.
        anchors: of each document.
        questions: of the first documents, the variants that see the question.
    """
    kept = (DENSE, STAR, OVERLAP)
    beside = [
        {name: scores[name][ASKED] for name in kept} | more for scores, more in zip(anchors, questions, strict=False)
    ]
    return {
        "model": model,
        "tokens": TOKENS,
        "block": BLOCK,
        "documents": len(anchors),
        "rows": rows_of(anchors),
        "question_documents": len(beside),
        "questions": len(beside[0][DENSE]),
        "question_rows": rows_of(beside, len(range(CODES)[ASKED])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model of Transformers")
    parser.add_argument("--documents", type=int, default=12, help="number of documents (%(default)s)")
    parser.add_argument(
        "--question-documents", type=int, default=12, help="how many of them are prefilled for each question too"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the documents")
    args = parser.parse_args()
    model, tokenizer, attention = load(args.model)
    rng = Random(args.seed)
    documents = [make_document(rng, tokenizer) for _ in range(args.documents)]
    anchors = [
        measure_anchors(model, tokenizer, attention, document, Random(number))
        for number, document in enumerate(track(documents, description="anchors"))
    ]
    questions = [
        measure_questions(model, attention, document)
        for document in track(documents[: args.question_documents], description="questions")
    ]
    result = result_of(args.model.name, anchors, questions)
    path = write_json(f"{NAME}_{args.model.name}", result)
    plot(result["rows"], path.with_suffix(".png"))
    print(markdown(result))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
