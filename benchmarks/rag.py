"""Right answers of retrieval, dense and with documents: `python -m benchmarks.rag models/qwen2.5-coder-0.5b-instruct`.

The documents are those of examples/rag.py: functions of the standard library with their documentation. A question has
the first sentence of a function's documentation, and asks for its name. Of the six documents in its prompt, which a TF-
IDF score finds, one has the answer. Questions whose function is not found are left out. Each prompt is answered dense
and with star_segments, behind the instructions alone and behind instructions with two questions that are answered
already: a longer head is a longer anchor. Then 24 documents of a question are asked about once more, in another order
and with the next question, in turns of dense attention, documents that are computed and cached documents. The server
has the preset `rag`, whose pages on CPUs are small. Writes results/rag_MODEL.json and .png, the picture of README.md.
Takes about 12 minutes. With --adapter, an adapter of `starling distil`, no times are measured: each question is also
answered with the adapter, with documents and dense, and the result is rag_FOLDER.json, by the adapter's folder. With
--training-prompts, only prompts of this kind are written, about functions of other modules.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.rag_prompts import (
    CHARACTERS,
    LONG,
    MARK,
    RETRIEVED,
    SHORT,
    Question,
    prompt_of,
    retrieval_questions,
    training_prompts,
)
from benchmarks.report import RESULTS, saved_figure, write_json
from examples.completions import Answer, Completions
from examples.server import serving
from examples.stdlib_documents import Index, make_documents
from starling.lab.statistics import ratio_interval

MAX_TOKENS = 16
DENSE, DOCUMENTS = "dense", "documents"
ADAPTER, DENSE_ADAPTER = "documents, adapter", "dense, adapter"
LORA = "adapter"
"""The adapter's name as a model of the server, for dense attention with it."""

FIRST, AGAIN = "documents first", "documents again"
ROUNDS, TIMED = 5, 24  # prompts whose times are measured, and the documents of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model with <|file_sep|> among its tokens")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--only-times", action="store_true", help="measure the times, and keep the stored answers")
    parser.add_argument("--adapter", type=Path, help="a folder that `starling distil` has made of the model")
    parser.add_argument(
        "--training-prompts", type=Path, metavar="FILE", help="only write prompts for `starling distil --prompts`"
    )
    args = parser.parse_args()
    if args.training_prompts:
        args.training_prompts.parent.mkdir(parents=True, exist_ok=True)
        lines = map(json.dumps, training_prompts(random.Random(0)))
        args.training_prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    index = Index(make_documents(CHARACTERS))
    examples, asked = retrieval_questions(index, args.questions)
    kinds = (DENSE, DOCUMENTS, *((ADAPTER, DENSE_ADAPTER) if args.adapter else ()))
    names = [(kind, head) for head in (SHORT, LONG) for kind in kinds]
    times: dict[str, list[float]] = {DENSE: [], FIRST: [], AGAIN: []}
    right: dict[tuple[str, str], list[bool]] = {name: [] for name in names}
    tokens: dict[tuple[str, str], list[int]] = {name: [] for name in names}
    options = ["--preset", "rag", "--max-model-len", "8192", "--enable-prompt-tokens-details", "--star-segments", MARK]
    if args.adapter:
        options += ["--star-adapter", str(args.adapter), "--enable-lora", "--lora-modules", f"{LORA}={args.adapter}"]
    with tempfile.TemporaryDirectory() as folder, serving(args.model, *options, log=Path(folder) / "log") as server:
        client = Completions(server.http)

        def ask(kind: str, head: str, found: list[str], question: Question, max_tokens: int, salt: str) -> Answer:
            star: dict[str, Any] = {"star": "off"}
            if kind in (DOCUMENTS, ADAPTER):
                star = {"star": "on", "star_adapter": "auto" if kind == ADAPTER else "off"}
            prompt = prompt_of(head, examples, found, question)
            more = {"model": LORA} if kind == DENSE_ADAPTER else {}
            answer = client.ask(prompt, star, max_tokens=max_tokens, stop=["\n"], cache_salt=salt, **more)
            assert answer.plan.get("adapter", False) == (kind == ADAPTER)
            return answer

        for question, found in track([] if args.only_times else asked, description="questions"):
            for kind, head in names:
                answer = ask(kind, head, found, question, MAX_TOKENS, f"{kind} {head}")
                is_right = re.search(rf"\b{re.escape(question.answer)}\b", answer.text) is not None
                right[kind, head].append(is_right)
                tokens[kind, head].append(answer.computed or 0)
        prompts = []
        timed = [] if args.adapter else [*pairwise(asked)][:ROUNDS]
        for (before, _), (question, _) in track(timed, description="times"):
            more = index.search(before.text, TIMED)
            turned = more[::-1]
            ask(DOCUMENTS, LONG, more, before, 1, f"{DOCUMENTS} {LONG}")  # now they are cached
            salts = (
                (DENSE, DENSE, f"{DENSE} {LONG}"),
                (FIRST, DOCUMENTS, f"{FIRST} {len(prompts)}"),
                (AGAIN, DOCUMENTS, f"{DOCUMENTS} {LONG}"),
            )
            for way, kind, salt in salts:
                answer = ask(kind, LONG, turned, question, 1, salt)
                times[way].append(answer.seconds)
                prompts.append(answer.prompt_tokens)
    name = f"rag_{(args.adapter or args.model).resolve().name}"
    rows = (
        json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        if args.only_times
        else [
            {
                "attention": kind,
                "head": head,
                "right": sum(right[kind, head]),
                "questions": len(asked),
                "only_dense": sum(one and not other for one, other in pairs(right, kind, head)),
                "only_this": sum(other and not one for one, other in pairs(right, kind, head)),
                "tokens_computed": sum(tokens[kind, head]),
            }
            for kind, head in names
        ]
    )
    show(rows)
    if args.adapter:
        print(write_json(name, {"preset": "rag", "rows": rows}))
        return
    seconds = {name: statistics.median(values) for name, values in times.items()}
    sooner, least, most = ratio_interval(times[AGAIN], times[DENSE])
    result = {"preset": "rag", "rows": rows, "seconds": seconds, "rounds": len(times[DENSE])}
    result |= {"prompt_tokens": statistics.median(prompts), "ratio": sooner, "ratio_interval": [least, most]}
    path = write_json(name, result)
    plot(result, path.with_suffix(".png"))
    print(f"{path}: the first token {sooner:.1f} times sooner [{least:.1f}, {most:.1f}]")


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot two panels: the seconds to the first token, and of how many questions the answer is right."""
    rows = {row["attention"]: row for row in result["rows"] if row["head"] == LONG}
    with saved_figure(path, 1, 2, figsize=(9, 2.4)) as (_, (left, right)):
        names = ["dense attention", "documents, the first time", "documents in another order"]
        seconds = [result["seconds"][name] for name in (DENSE, FIRST, AGAIN)]
        left.bar_label(left.barh(names, seconds, color=["0.6", "C0", "C0"]), [f" {value:.2f} s" for value in seconds])
        left.set(xlabel=f"seconds to the first token, {TIMED} documents")
        left.set_xlim(0, 1.35 * max(seconds))
        left.invert_yaxis()
        numbers = [rows[kind]["right"] for kind in (DENSE, DOCUMENTS)]
        of = rows[DENSE]["questions"]
        bars = right.barh(["dense attention", "documents"], numbers, color=["0.6", "C0"])
        right.bar_label(bars, [f" {number} of {of}" for number in numbers])
        right.set(xlabel=f"right answers, {RETRIEVED} documents", xlim=(0, of))
        right.invert_yaxis()


def pairs(right: dict[tuple[str, str], list[bool]], kind: str, head: str) -> Iterator[tuple[bool, bool]]:
    """Yield, for each question, whether dense attention and this configuration have it right with this head."""
    return zip(right[DENSE, head], right[kind, head], strict=True)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("head", "attention", "right", "only dense right", "only this right", "tokens computed")
    for row in rows:
        numbers = f"{row['right']} of {row['questions']}", str(row["only_dense"]), str(row["only_this"])
        table.add_row(row["head"], row["attention"], *numbers, f"{row['tokens_computed']:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
