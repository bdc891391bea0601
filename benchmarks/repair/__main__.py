"""What repair of documents leaves of their loss, and at how much work: `python -m benchmarks.repair models/NAME`.

Documents with their natural borders (files, notes, passages) are computed each behind the head alone, as Starling's
documents are. Then pages of them are chosen, and computed again with everything in view, before the question is
answered. For each rule of choice the benchmark compares the divergence (KL) from dense attention at the answer's first
tokens with that of documents without repair, and counts the work. The work of a choice is part of the budget: with 20 %
of the work, a rule that needs a pass of the question computes so many tokens less again. Writes
results/repair_NAME.json and .png after each round, which has a prompt of each task.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.approximations import MaskedAttention, interval, load
from benchmarks.engine import ROOT
from benchmarks.repair.kv import Answered, answered, dense_heads_kv, dense_kv, deviation, document_kv, document_mask
from benchmarks.repair.selection import RULES, Facts, Rule, Work, choose, documents_work, pages_of
from benchmarks.report import markdown_table, saved_figure, write_json
from starling.config.head_scores import HeadScores, read_scores
from starling.lab.evaluation.document_prompts import DocumentPrompt, Encoder, make_prompt
from starling.lab.models import kl_at_each
from starling.lab.statistics import mean_ratio

TASK_NAMES = ("code", "nth_note", "moves", "vt", "niah_multikey_2", "niah_multivalue", "association")
HEADS = 0.1
"""The share of the KV heads that are retrieval heads, or dense: those with the highest scores."""

GATE_SHARE, GATE_LOSS = 0.2, 0.5
DENSE, DOCUMENTS, DENSE_HEADS = "dense", "documents, no repair", "dense heads, no repair"
DENSE_HEADS_REPAIRED = "dense heads, question's attention, retrieval heads"
REPAIRED_BY = RULES["question's attention, retrieval heads"]

Key = tuple[str, float]
"""(selection, share of the documents' tokens that are computed again)."""


@dataclass(frozen=True)
class Outcome:
    """An answer after a repair.

    Attributes:
        kl: from dense, the mean over the answer's tokens, in nats.
        logprob: of the answer's tokens, the mean.
        right: whether greedy decoding gives them.
        tokens, keys: the work beside that of computing all documents densely.
    """

    kl: float
    logprob: float
    right: bool
    tokens: float
    keys: float


def outcome(found: Answered, dense: Answered, prompt: DocumentPrompt, work: Work) -> Outcome:
    expected, whole = torch.tensor(prompt.answer), documents_work(prompt)
    return Outcome(
        kl=float(kl_at_each(dense.logprobs, found.logprobs).mean()),
        logprob=float(found.logprobs[torch.arange(len(expected)), expected].mean()),
        right=bool((found.logprobs.argmax(-1) == expected).all()),
        tokens=work.tokens / whole.tokens,
        keys=work.keys / whole.keys,
    )


class Repairs:
    """One prompt whose documents are repaired again and again.

    Args:
        scores: of the model's KV heads.
        seed: of the random choice.
    """

    def __init__(
        self, model: Any, attention: MaskedAttention, prompt: DocumentPrompt, scores: HeadScores, seed: str
    ) -> None:
        self.model, self.attention, self.prompt, self.seed = model, attention, prompt, seed
        self.heads = set(scores.order[: scores.count(HEADS)])
        self.none = torch.zeros(len(prompt.context), dtype=torch.bool)
        self.dense_layers = dense_kv(model, attention, prompt)
        self.dense = self.answer(self.dense_layers, self.none)

    def answer(self, layers: Any, chosen: torch.Tensor) -> Answered:
        return answered(self.model, self.attention, self.prompt, layers, chosen)

    def outcome(self, found: Answered, work: Work) -> Outcome:
        return outcome(found, self.dense, self.prompt, work)

    def facts(self, unrepaired: Answered) -> Facts:
        off = deviation(unrepaired.layers, self.dense_layers)
        return Facts(pages_of(self.prompt), unrepaired.attention, off, self.heads, self.seed)

    def repaired(self, rule: Rule, facts: Facts, unrepaired: Answered, share: float) -> tuple[Answered, Work]:
        """The answer after all passes of a rule, and the work of choices and repairs."""
        num_layers, length = self.model.config.num_hidden_layers, len(self.prompt.context)
        cost = rule.cost(self.prompt, num_layers)
        budget = share * documents_work(self.prompt).tokens / rule.passes
        now, work = unrepaired, Work()
        for _ in range(rule.passes):
            chosen = choose(rule.scores(facts), facts.pages, length, budget)
            work += cost + Work(float(chosen.sum()), float((chosen.nonzero() + 1).sum()))
            now = self.answer(now.layers, chosen)
            left = [page for page in facts.pages if not chosen[page.start]]
            facts = replace(facts, pages=left, attention=now.attention)
        return now, work

    def measured(self, shares: Sequence[float]) -> Iterator[tuple[Key, Outcome]]:
        """Each selection with each share of the tokens."""
        yield (DENSE, 1.0), self.outcome(self.dense, documents_work(self.prompt))
        unrepaired = self.answer(document_kv(self.model, self.attention, self.prompt), self.none)
        yield (DOCUMENTS, 0.0), self.outcome(unrepaired, Work())
        facts = self.facts(unrepaired)
        for name, rule in RULES.items():
            for share in shares:
                yield (name, share), self.outcome(*self.repaired(rule, facts, unrepaired, share))
        yield from self.with_dense_heads()

    def with_dense_heads(self) -> Iterator[tuple[Key, Outcome]]:
        """Documents with dense heads, which can't be cached by themselves: without repair, and at the gate's share."""
        layers = dense_heads_kv(self.model, self.attention, self.prompt, self.heads)
        unrepaired = self.answer(layers, self.none)
        work = self.dense_heads_work()
        yield (DENSE_HEADS, 1.0), self.outcome(unrepaired, work)
        found, more = self.repaired(REPAIRED_BY, self.facts(unrepaired), unrepaired, GATE_SHARE)
        yield (DENSE_HEADS_REPAIRED, 1.0 + GATE_SHARE), self.outcome(found, work + more)

    def dense_heads_work(self) -> Work:
        config, whole = self.model.config, documents_work(self.prompt)
        share = len(self.heads) / (config.num_hidden_layers * config.num_key_value_heads)
        return Work(whole.tokens, share * whole.keys + (1 - share) * own_keys(self.prompt))


def own_keys(prompt: DocumentPrompt) -> float:
    """The query-key pairs of documents that see the head and themselves."""
    return float(document_mask(prompt)[len(prompt.head) :].sum())


def rows_of(prompts: Sequence[Mapping[Key, Outcome]]) -> list[dict[str, Any]]:
    """A row for each selection and share. Loss is KL from dense, over that of documents without repair."""
    before = np.array([found[DOCUMENTS, 0.0].kl for found in prompts])
    rows = []
    for name, share in prompts[0]:
        found = [outcomes[name, share] for outcomes in prompts]
        dense = [outcomes[DENSE, 1.0] for outcomes in prompts]
        rows.append(
            {
                "selection": name,
                "share": share,
                "tokens": float(np.mean([one.tokens for one in found])),
                "keys": float(np.mean([one.keys for one in found])),
                "loss_left": mean_ratio(np.array([one.kl for one in found]), before),
                "logprob_over_dense": interval(
                    np.array([one.logprob - right.logprob for one, right in zip(found, dense, strict=True)])
                ),
                "right": float(np.mean([one.right for one in found])),
            }
        )
    return rows


def result_of(
    name: str, tokens: int, prompts: Sequence[DocumentPrompt], found: Sequence[Mapping[Key, Outcome]]
) -> dict:
    """What is stored."""
    return {
        "model": name,
        "tokens": tokens,
        "prompts": len(found),
        "tasks": list(TASK_NAMES),
        "documents": float(np.mean([len(prompt.documents) for prompt in prompts])),
        "head_tokens": float(np.mean([len(prompt.head) for prompt in prompts])),
        "question_tokens": float(np.mean([len(prompt.question) for prompt in prompts])),
        "own_keys": float(np.mean([own_keys(prompt) / documents_work(prompt).keys for prompt in prompts])),
        "loss": float(np.mean([one[DOCUMENTS, 0.0].kl for one in found])),
        "rows": rows_of(found),
    }


def best(result: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a rule that can be built, at the gate's share, which leaves the least loss."""
    built = [row for row in result["rows"] if row["share"] == GATE_SHARE and "oracle" not in row["selection"]]
    found: dict[str, Any] = min(built, key=lambda row: row["loss_left"][0])
    return found


def verdict(result: Mapping[str, Any]) -> str:
    """Whether the gate is passed, in a sentence."""
    row = best(result)
    passed = "passes" if row["loss_left"][0] <= GATE_LOSS else "does not pass"
    left = "{:.2f} [{:.2f}, {:.2f}]".format(*row["loss_left"])
    return f"{result['model']} {passed}: {row['selection']} leaves {left} of the loss."


def markdown(result: Mapping[str, Any]) -> str:
    """A table for one model: the loss that is left, and in brackets its interval.

    Work and right answers are those of GATE_SHARE.
    """
    rows = {(row["selection"], row["share"]): row for row in result["rows"]}
    shares = sorted({share for name, share in rows if name in RULES})
    columns = ["no repair", *(f"{100 * share:.0f} % of the pages" for share in shares)]
    title = f"{result['model']}, {result['prompts']} prompts"
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        of_name = {share: row for (other, share), row in rows.items() if other == name}
        last = of_name.get(GATE_SHARE) or next(iter(of_name.values()))
        if name not in RULES:
            of_name = {GATE_SHARE if name == DENSE_HEADS_REPAIRED else 0.0: last}
        cells = [of_name.get(share) for share in (0.0, *shares)]
        texts = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["loss_left"]) if row else "" for row in cells]
        work = [f"{100 * last[field]:.0f} %" for field in ("tokens", "keys", "right")]
        lines.append([name, *texts, *work])
    return markdown_table([title, *columns, "tokens", "keys", "right"], lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Loss over work, a line for each rule."""
    with saved_figure(path, figsize=(8, 4.5)) as (_, axis):
        for name in RULES:
            rows = [row for row in result["rows"] if row["selection"] == name]
            work, left = [100 * row["tokens"] for row in rows], [row["loss_left"][0] for row in rows]
            axis.plot([0, *work], [1, *left], "o:" if "oracle" in name else "o-", label=name)
        axis.axhline(GATE_LOSS, color="black", linewidth=0.5)
        axis.axvline(100 * GATE_SHARE, color="black", linewidth=0.5)
        axis.set(
            ylim=(0, None),
            xlabel="tokens computed, the choice too, % of the documents'",
            ylabel="loss left, without repair is 1",
        )
        left = best(result)["loss_left"][0]
        axis.set_title(
            f"{result['model']}: repair of a fifth of the pages leaves {100 * left:.0f} % of the loss", fontsize=10
        )
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model of Transformers")
    parser.add_argument("--scores", type=Path, help="scores of its KV heads; by default those that come with Starling")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="prompts of each task (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="of the pages (%(default)s)")
    args = parser.parse_args()
    if GATE_SHARE not in args.shares:
        parser.error(f"--shares {args.shares}: {GATE_SHARE} has to be one of them.")
    scores = read_scores(str(args.scores or ROOT / "features" / "dense_heads" / "scores" / f"{args.model.name}.json"))
    model, tokenizer, attention = load(args.model)
    encoder = Encoder(tokenizer)
    prompts: list[DocumentPrompt] = []
    found: list[dict[Key, Outcome]] = []
    for number in range(args.rounds):
        for task in track(TASK_NAMES, description=f"round {number + 1} of {args.rounds}"):
            prompts.append(make_prompt(task, f"repair/{task}/{number}", args.tokens, encoder))
            repairs = Repairs(model, attention, prompts[-1], scores, f"{task}/{number}")
            found.append(dict(repairs.measured(args.shares)))
        result = result_of(args.model.name, args.tokens, prompts, found)
        path = write_json(f"repair_{args.model.name}", result)
        plot(result, path.with_suffix(".png"))
    print(markdown(result))
    print(verdict(result))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
