"""The effect of the padding before segments on a model's answer: `python -m benchmarks.segment_padding`.

A prompt has six files of the standard library, each after `<file_sep>`. One file has a secret code in it, and the
prompt's question is for that code. The benchmark computes the log-probability of the right answer, on the demo model in
float32 with the explicit mask. It compares Star Attention on the prompt as it is with Star Attention on the prompt
whose files are moved to the borders of star blocks, with several kinds of padding. Writes results/segment_padding.json
and .png. Takes 10 minutes with 40 prompts on two cores.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import saved_figure, write_json
from examples.make_demo_model import RELEASE
from starling.attention_backends.star.reference import star_mask
from starling.scheduler.star.segments import fill_gaps, find_gaps, positions_of

BLOCK, FILES = 256, 6
MARK = "<file_sep>"
PADDINGS = {"line breaks": "\n", "spaces": " ", "<|im_end|>": "<|im_end|>", "<|endoftext|>": "<|endoftext|>"}
CITIES = ("Paris", "London", "Madrid", "Rome", "Berlin", "Vienna", "Lisbon", "Dublin", "Oslo", "Prague")
NAME, DENSE, STAR = "segment_padding", "dense", "star"


def make_prompt(tokens: random.Random, encode: Any, files: list[Path]) -> tuple[list[int], list[int], list[int]]:
    """(context, question, answer): token ids; the context starts with an instruction."""
    city, code = tokens.choice(CITIES), str(tokens.randrange(10_000, 100_000))
    pieces = []
    for path in tokens.sample(files, FILES):
        ids = encode(path.read_text())
        start = tokens.randrange(max(1, len(ids) - 300))
        pieces.append(ids[start : start + tokens.randrange(80, 215)])
    hidden = tokens.choice(pieces)
    position = tokens.randrange(len(hidden))
    hidden[position:position] = encode(f"\nThe secret code of {city} is {code}.\n")
    context = encode("Several files follow. One of them has a secret code in it: remember the code.\n")
    for piece in pieces:
        context += encode(MARK) + piece
    question = encode(f"\nQuestion: What is the secret code of {city}?\nAnswer: The secret code of {city} is")
    return context, question, encode(f" {code}")


@torch.inference_mode()
def answer_logprob(model: Any, context: list[int], question: list[int], answer: list[int], star: bool) -> float:
    """Log-probability of the answer's tokens, under Star Attention or dense attention."""
    ids = context + question + answer
    context_end = len(context) if star else 0
    mask = star_mask(len(ids), block_size=BLOCK, anchor_size=BLOCK, overlap_size=0, context_end=context_end)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    kept = len(answer) + 1
    logits = model(torch.tensor([ids]), attention_mask=bias[None, None], use_cache=False, logits_to_keep=kept).logits
    logprobs = logits[0, :-1].log_softmax(-1)
    return float(logprobs[torch.arange(len(answer)), torch.tensor(answer)].sum())


def measure(model: Any, tokenizer: Any, count: int, seed: int) -> tuple[dict[str, list[float]], list[float]]:
    """Layout of the files -> log-probability of each prompt's answer; and the padding's fraction of each prompt."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    tokens = random.Random(seed)
    logprobs: dict[str, list[float]] = {name: [] for name in (DENSE, STAR, *PADDINGS)}
    padded: list[float] = []

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    (mark,) = encode(MARK)
    for _ in track(range(count), description="prompts"):
        context, question, answer = make_prompt(tokens, encode, files)
        for name in (DENSE, STAR):
            logprobs[name].append(answer_logprob(model, context, question, answer, name == STAR))
        for name, text in PADDINGS.items():
            aligned = fill_gaps(context, find_gaps(positions_of(mark, context, len(context)), BLOCK), encode(text)[0])
            logprobs[name].append(answer_logprob(model, aligned, question, answer, True))
        padded.append(1 - len(context) / len(aligned))
    return logprobs, padded


def compare_to_star(logprobs: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Layout -> its mean, and the mean difference to Star Attention without padding, plus or minus a 95 % interval."""
    rows = {}
    for name, values in logprobs.items():
        difference = np.asarray(values) - np.asarray(logprobs[STAR])
        half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
        rows[name] = {"mean": float(np.mean(values)), "over_star": float(difference.mean()), "plus_minus": half}
    return rows


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    names = [name for name in rows if name != STAR]
    with saved_figure(path, figsize=(6, 3)) as (_, axis):
        axis.barh(names, [rows[n]["over_star"] for n in names], xerr=[rows[n]["plus_minus"] for n in names])
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_xlabel("log-probability of the answer, over star without alignment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40, help="number of prompts (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(RELEASE.output, dtype=torch.float32).eval()
    logprobs, padded = measure(model, AutoTokenizer.from_pretrained(RELEASE.output), args.prompts, args.seed)
    rows = compare_to_star(logprobs)
    table = Table(title=f"log-probability of the answer; padding is {np.mean(padded):.0%} of the aligned prompts")
    for column in ("prompt", "mean", "over star", "+-"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    Console().print(table)
    result = {"block": BLOCK, "prompts": args.prompts, "padding_share": float(np.mean(padded)), "rows": rows}
    plot(rows, write_json(NAME, result).with_suffix(".png"))


if __name__ == "__main__":
    main()
