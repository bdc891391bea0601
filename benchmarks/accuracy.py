"""Cost of Star Attention in answers: `python -m benchmarks.accuracy models/NAME --length 2048`.

Runs `starling eval` on one model and length: dense attention, the paper's star blocks (A = B), a small anchor with an
overlap at the same number of keys, and half an anchor and half an overlap. Goes on where an earlier run of the same
model and length ended. Writes results/accuracy_NAME_LENGTH.json and .png, which docs/star-accuracy.md shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import markdown_table, write_json
from starling.lab.evaluation.comparison import ALL
from starling.lab.evaluation.prompt_options import DENSE, parse_plan
from starling.lab.evaluation.store import RESULTS, Answer, read_answers
from starling.lab.statistics import kl_divergence, mean_ratio
from starling.scheduler.planning.sizes import default_anchor_size

FOLDER = Path(__file__).resolve().parent / "out" / "accuracy"
TASKS = "vt,niah_multikey_2,niah_multivalue,fwe,moves,association,nth_note,code"
PAGE_SIZE, QUERY_TOKENS, LOGPROBS = 32, 128, 4
PAPER = "A = B"
OWN_POSITIONS = "P=block"
"""In the name of a plan of older results: A = B, but with positions of a block's own. No request can ask for it now."""
ENGINE = ("--block-size", str(PAGE_SIZE), "--max-num-batched-tokens", "2048", "--enforce-eager")


def plans(length: int, parts: list[int]) -> list[str]:
    """Return the plans with B = length / part, as `starling eval` takes them: the paper's, and an overlap each."""
    named = []
    for part in parts:
        block = length // part // PAGE_SIZE * PAGE_SIZE
        anchor = default_anchor_size(block, PAGE_SIZE)
        named += [f"B={block},A={block},O=0,Q={QUERY_TOKENS}"]
        named += [f"B={block},A={anchor},O={block - anchor},Q={QUERY_TOKENS}"]
    return named


def half_anchor(name: str) -> str:
    """Return the plan of that name, but with an anchor of half a block and an overlap of the other half."""
    block = int(parse_plan(name).options["star_block_size"])
    half = block // 2 // PAGE_SIZE * PAGE_SIZE
    return f"B={block},A={half},O={block - half},Q={QUERY_TOKENS}"


def has_own_positions(name: str) -> bool:
    return OWN_POSITIONS in name.split(",")


def evaluation(results: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `starling eval`'s results that is kept: without answers, paths and the server's name."""
    kept = ("version", "created", "setup", "cells")
    return {name: results[name] for name in kept}


def loss_ratios(answers: list[Answer], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return, for each pair of plans, the second's loss over the first's: KL, and log-probability of the answer.

    The mean over prompts, of which each task has as many, and a 95 % bootstrap interval over prompts, fixed seed.
    """
    by_prompt: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt, {})[answer.plan] = answer

    divergences, losses = (
        {
            name: np.array([loss(found[DENSE.name], found[name]) for found in by_prompt.values()])
            for name in {name for pair in pairs for name in pair}
        }
        for loss in (mean_kl, logprob_loss)
    )
    return [
        {
            "paper": paper,
            "other": other,
            "kl_ratio": mean_ratio(divergences[other], divergences[paper]),
            "logprob_ratio": mean_ratio(losses[other], losses[paper]),
        }
        for paper, other in pairs
    ]


def answers_of(setup: dict[str, Any], answers: list[Answer]) -> list[Answer]:
    """Return the answers that a run compared, of all that its folder has.

    Earlier runs may have had more prompts and plans.
    """
    prompts = {
        f"{task}/{length}/{index}"
        for task in setup["tasks"]
        for length in setup["lengths"]
        for index in range(setup["prompts_per_cell"])
    }
    return [answer for answer in answers if answer.prompt in prompts and answer.plan in setup["plans"]]


def run_eval(
    server: Sequence[str], plans: Sequence[str], tasks: str, length: int, prompts: int, folder: Path
) -> tuple[dict[str, Any], list[Answer]]:
    """Run `starling eval`, and return its results and the answers that it compared.

    Raises SystemExit with its code if it fails.

    Args:
        server: arguments that name the server: a model and options of `starling serve`, or --base-url.
        prompts: number of prompts of each task.
    """
    command = [str(Path(sys.executable).with_name("starling")), "eval", *server, "--tasks", tasks]
    command += ["--lengths", str(length), "--prompts-per-cell", str(prompts), "--logprobs", str(LOGPROBS)]
    command += ["--out", str(folder), *(argument for plan in plans for argument in ("--plan", plan))]
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    results, path = json.loads((folder / "results.json").read_text()), folder / RESULTS
    return results, answers_of(results["setup"], read_answers(path, path.read_bytes().splitlines()))


def mean_kl(dense: Answer, other: Answer) -> float:
    """Return the divergence of one prompt, the mean over the tokens of its answer."""
    scores = zip(dense.scores, other.scores, strict=True)
    return float(np.mean([kl_divergence(ours.top, theirs.top) for ours, theirs in scores]))


def logprob_loss(dense: Answer, other: Answer) -> float:
    """Return the loss in log-probability of the right answer's tokens to dense, in nats, the mean over them."""
    return float(
        np.mean([ours.logprob - theirs.logprob for ours, theirs in zip(dense.scores, other.scores, strict=True)])
    )


def described(name: str) -> str:
    """Return a plan in words."""
    if has_own_positions(name):
        return "positions of a block's own"
    options = parse_plan(name).options
    block, anchor = options["star_block_size"], options["star_anchor_size"]
    if anchor == block:
        return PAPER
    return "half an anchor and half an overlap" if name == half_anchor(name) else "an overlap"


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/star-accuracy.md: a row for each model, length and plan, over all tasks."""
    rows = []
    for result in results:
        model, (tokens,) = Path(result["setup"]["model"]).name, result["setup"]["lengths"]
        ratios = {pair["other"]: pair["kl_ratio"] for pair in result["over_paper"] if described(pair["paper"]) == PAPER}
        for cell in result["cells"]:
            if cell["task"] == ALL and cell["plan"] != DENSE.name:
                columns = (
                    f"{model}, {tokens:,}, {100 * cell['dense_score']:.0f}",
                    f"`{cell['plan'].removesuffix(f',Q={QUERY_TOKENS}')}`",
                    f"{100 * cell['attended_keys']:.0f} %",
                    "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                        *(100 * cell["difference"][end] for end in ("mean", "low", "high"))
                    ),
                    f"{cell['kl']:.3f}",
                    "{:.2f} [{:.2f}, {:.2f}]".format(*ratios[cell["plan"]]) if cell["plan"] in ratios else "",
                )
                rows.append(columns)
    head = ("model, tokens, dense's points", "plan", "attention work", "points", "KL", "KL over A = B's")
    return markdown_table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt and its answer (%(default)s)")
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 8, 16], help="n/B (%(default)s)")
    parser.add_argument(
        "--half", type=int, nargs="*", default=[8], help="n/B with half an anchor, half an overlap (%(default)s)"
    )
    parser.add_argument("--prompts-per-cell", type=int, default=13, help="prompts of each task (%(default)s)")
    parser.add_argument("--result", metavar="NAME", help="name of the results' file (accuracy_MODEL_LENGTH)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more options of `starling serve`")
    args = parser.parse_args()
    name = f"{args.model.name}_{args.length}"
    names = plans(args.length, args.parts)
    halves = [(paper, half_anchor(paper)) for paper in plans(args.length, args.half)[::2] if paper in names]
    pairs = [*zip(names[::2], names[1::2], strict=True), *halves]
    pairs += [(names[names.index(paper) + 1], half) for paper, half in halves]
    names += [half for _, half in halves]
    server = [str(args.model), *ENGINE, "--star-dense-heads", "0", *args.serve]
    results, answers = run_eval(server, names, TASKS, args.length, args.prompts_per_cell, FOLDER / name)
    result = evaluation(results) | {"over_paper": loss_ratios(answers, pairs)}
    path = write_json(args.result or f"accuracy_{name}", result)
    shutil.copy(FOLDER / name / "differences.png", path.with_suffix(".png"))
    print(markdown([result]))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
