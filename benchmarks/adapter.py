"""Loss of documents that an adapter of `starling distil` leaves: `python -m benchmarks.adapter MODEL ADAPTER`.

On prompts of documents, in Transformers, with the pass that `starling distil` trains with: documents, documents with
the adapter, and dense attention with the adapter, each as KL from the model's dense attention at the answer's tokens,
and as right answers (all tokens of the answer are the most probable ones, given those before). The kinds of prompts:
tasks that adapters are trained on by default, all other tasks, English prose and C++ headers, whose passages have to be
repeated; and the trained tasks at four times the length, and in documents of four times the length. Writes
results/adapter_MODEL.json and .png; a row of each adapter, by --name. Takes 15 minutes with the demo model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.report import saved_figure, write_row
from starling.lab.distillation.adapted_model import AdaptedModel, make_rows
from starling.lab.distillation.training import document_plan
from starling.lab.distillation.training_prompts import TRAINED_TASKS, with_recalls
from starling.lab.evaluation.document_prompts import ANSWER_TOKENS, Asked, DocumentPrompt, Encoder, Style, make_prompt
from starling.lab.models import DTYPES, kl_at_each
from starling.lab.statistics import mean_ratio

OTHERS = ("nth_note", "niah_multivalue", "niah_multiquery", "niah_single_3")
TOKENS = 1024
DENSE, DOCUMENTS, ADAPTER, DENSE_ADAPTER = "dense", "documents", "documents, adapter", "dense, adapter"


@dataclass(frozen=True)
class Outcome:
    """Result of one prompt and way: mean KL from dense at the answer, mean log-probability of the right one."""

    kl: float
    logprob: float
    right: bool


def text_prompts(encoder: Encoder, texts: Sequence[str], count: int) -> Iterator[DocumentPrompt]:
    """Yield prompts of passages, one of which has to be repeated."""
    style = Style()
    head = encoder.encode(encoder.layout(style).head)
    for number in range(count):
        rng = Random(f"text/{number}")
        documents: list[tuple[int, ...]] = []
        while sum(map(len, documents)) < TOKENS:
            documents.append(encoder.encode(rng.choice(texts))[:200])
        prompt = DocumentPrompt("text", head, tuple(documents), (Asked((1,), (1,)),))
        found = with_recalls(prompt, encoder, style, rng, 2).asked[1:]
        if found:
            yield replace(prompt, asked=found)


def prose() -> list[str]:
    """Return passages of the descriptions of installed packages."""
    texts = []
    for package in sorted(importlib.metadata.distributions(), key=lambda each: each.metadata["Name"].lower()):
        body = package.metadata.json.get("description", "")
        texts += [part for part in str(body).split("\n\n") if len(part.split()) > 60]
    return texts


def headers() -> list[str]:
    """Return passages of torch's C++ headers."""
    files = sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))[:200]
    parts = [part for path in files for part in path.read_text(errors="replace").split("\n\n")]
    return [part for part in parts if len(part.split()) > 40]


def kinds(encoder: Encoder, count: int) -> dict[str, list[DocumentPrompt]]:
    """Name of a kind -> its prompts."""
    style = Style(answer_tokens=ANSWER_TOKENS)

    def of_tasks(tasks: Sequence[str], tokens: int, each: int, style: Style = style) -> list[DocumentPrompt]:
        return [make_prompt(task, f"adapter/{task}/{n}", tokens, encoder, style) for n in range(each) for task in tasks]

    return {
        "trained tasks": of_tasks(TRAINED_TASKS, TOKENS, count),
        "other tasks": of_tasks(OTHERS, TOKENS, 2 * count),
        f"trained tasks, {4 * TOKENS:,} tokens": of_tasks(TRAINED_TASKS, 4 * TOKENS, max(count // 4, 1)),
        "trained tasks, documents of 400 tokens": of_tasks(TRAINED_TASKS, TOKENS, count // 2, Style(least_tokens=400)),
        "English prose": list(text_prompts(encoder, prose(), 4 * count)),
        "C++ headers": list(text_prompts(encoder, headers(), 4 * count)),
    }


@torch.inference_mode()
def outcomes(model: AdaptedModel, prompt: DocumentPrompt) -> dict[str, Outcome]:
    """Return each way's outcome for a prompt's first question."""
    asked = prompt.asked[0]
    tail, answer = [*asked.question, *asked.answer[:-1]], torch.tensor(asked.answer)
    plan = document_plan(prompt)
    ways = {DENSE: (None, False), DOCUMENTS: (plan, False), ADAPTER: (plan, True), DENSE_ADAPTER: (None, True)}
    found = {
        name: model.log_probs(make_rows(prompt.context, [tail], of_plan), adapter=adapter)[-len(answer) :]
        for name, (of_plan, adapter) in ways.items()
    }
    dense = found[DENSE]
    return {
        name: Outcome(
            float(kl_at_each(dense, logprobs).mean()),
            float(logprobs.gather(1, answer[:, None]).mean()),
            bool((logprobs.argmax(-1) == answer).all()),
        )
        for name, logprobs in found.items()
    }


def row_of(kind: str, prompts: Sequence[DocumentPrompt], found: Sequence[dict[str, Outcome]]) -> dict[str, Any]:
    """Return a kind's means; what the adapter leaves of the divergence of documents, with an interval; KL by task."""
    kl = {name: np.array([each[name].kl for each in found]) for name in found[0]}
    tasks = np.array([prompt.task for prompt in prompts])
    by_task = {
        task: [float(kl[way][tasks == task].mean()) for way in (DOCUMENTS, ADAPTER)] for task in np.unique(tasks)
    }
    return {
        "kind": kind,
        "prompts": len(found),
        "kl": {name: float(values.mean()) for name, values in kl.items()},
        "by_task": by_task,
        "left": mean_ratio(kl[ADAPTER], kl[DOCUMENTS]),
        "logprob": {name: float(np.mean([each[name].logprob for each in found])) for name in found[0]},
        "right": {name: int(sum(each[name].right for each in found)) for name in found[0]},
    }


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    names = ("prompts", "KL of documents", "left by the adapter", "KL of dense with it", "right: dense", "documents")
    table = Table(*names, "with it", "dense with it", title=title)
    for row in rows:
        left, low, high = row["left"]
        right = [str(row["right"][name]) for name in (DENSE, DOCUMENTS, ADAPTER, DENSE_ADAPTER)]
        name = f"{row['kind']} ({row['prompts']})"
        kl = row["kl"]
        table.add_row(
            name, f"{kl[DOCUMENTS]:.3f}", f"{left:.2f} [{low:.2f}, {high:.2f}]", f"{kl[DENSE_ADAPTER]:.3f}", *right
        )
    Console(width=150).print(table)


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    with saved_figure(path, 1, 1, figsize=(9, 4)) as (_, axis):
        names = [row["kind"] for row in rows]
        lefts = np.array([row["left"] for row in rows])
        axis.barh(names, lefts[:, 0], xerr=[lefts[:, 0] - lefts[:, 1], lefts[:, 2] - lefts[:, 0]], capsize=3)
        axis.axvline(1.0, color="grey", linestyle=":")
        axis.set_xlabel("divergence from dense that the adapter leaves, of that of documents")
        axis.set_title(title)
        axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--name", default="default", help="of the adapter's row (%(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="of each task (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    config = PeftConfig.from_pretrained(args.adapter)
    model = AdaptedModel(args.model, "cpu", DTYPES[args.dtype], config, recompute=False)
    model.load(args.adapter)
    encoder = Encoder(AutoTokenizer.from_pretrained(args.model))
    rows = []
    for kind, prompts in kinds(encoder, args.prompts).items():
        rows.append(row_of(kind, prompts, [outcomes(model, prompt) for prompt in track(prompts, description=kind)]))
    title = f"{args.model.name}: rank {config.r}, {', '.join(sorted(config.target_modules))}"
    name = f"adapter_{args.model.name}"
    row = {"name": args.name, "rank": config.r, "modules": sorted(config.target_modules), "kinds": rows}
    _, path = write_row(name, "adapters", row, ("name",), model=args.model.name, tokens=TOKENS)
    show(rows, title)
    plot(rows, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
