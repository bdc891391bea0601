"""What Star Attention costs in answers: `python -m benchmarks.accuracy models/NAME --length 2048`.

Runs `starling eval` on one model and length: dense attention, the paper's star blocks (A = B), and a small anchor with
an overlap at the same number of keys. Goes on where an earlier run of the same model and length ended. Writes
results/accuracy_NAME_LENGTH.json and .png, which docs/star-accuracy.md shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import OUT, write_json
from scheduler.star.sizes import default_anchor_size

FOLDER = Path(__file__).resolve().parent / "out" / "accuracy"
TASKS = "vt,niah_multikey_2,niah_multivalue,fwe,moves,association,nth_note,code"
PAGE_SIZE, QUERY_TOKENS, LOGPROBS = 32, 128, 4
ENGINE = ("--block-size", str(PAGE_SIZE), "--max-num-batched-tokens", "2048", "--enforce-eager")


def plans(length: int, parts: list[int]) -> list[str]:
    """The plans with B = length / part, as `starling eval` takes them: for each part the paper's, and an overlap."""
    named = []
    for part in parts:
        block = length // part // PAGE_SIZE * PAGE_SIZE
        anchor = default_anchor_size(block, PAGE_SIZE)
        named += [f"B={block},A={block},O=0,Q={QUERY_TOKENS}"]
        named += [f"B={block},A={anchor},O={block - anchor},Q={QUERY_TOKENS}"]
    return named


def evaluation(results: dict[str, Any]) -> dict[str, Any]:
    """The part of `starling eval`'s results that is kept: without answers, paths and the server's name."""
    kept = ("version", "created", "setup", "cells")
    return {name: results[name] for name in kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt and its answer (%(default)s)")
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 8, 16], help="n/B (%(default)s)")
    parser.add_argument("--prompts-per-cell", type=int, default=13, help="prompts of each task (%(default)s)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more options of `starling serve`")
    args = parser.parse_args()
    name = f"{args.model.name}_{args.length}"
    command = [str(Path(sys.executable).with_name("starling")), "eval", str(args.model)]
    command += ["--tasks", TASKS, "--lengths", str(args.length), "--prompts-per-cell", str(args.prompts_per_cell)]
    for plan in plans(args.length, args.parts):
        command += ["--plan", plan]
    command += ["--logprobs", str(LOGPROBS), "--out", str(FOLDER / name), *ENGINE, *args.serve]
    code = subprocess.run(command).returncode
    if code:
        return code
    results = json.loads((FOLDER / name / "results.json").read_text())
    path = write_json(f"accuracy_{name}", evaluation(results))
    shutil.copy(FOLDER / name / "differences.png", OUT / f"accuracy_{name}.png")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
