"""`starling calibrate`: scores a model's KV heads, and writes the file that `--star-heads` reads."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from starling.attention_backends.star.model_heads import checkpoint_digest
from starling.config.head_scores import HeadScores
from starling.lab.calibration.gated_model import GatedModel, ScoredPrompt
from starling.lab.calibration.scorers import CalibrationOptions, Found, GradientScorer, part_of, replace_text
from starling.lab.command_line import add_options, given_options, make_console, progress_bars, run_command
from starling.lab.evaluation.commands.measuring import make_prompts
from starling.lab.evaluation.prompt_options import parse_options
from starling.lab.evaluation.tasks import GROUPS, TASKS
from starling.lab.evaluation.tokenizer import LocalTokenizer
from starling.lab.models import DTYPES, find_model

COMMAND = "starling calibrate"
DEFAULT_TASKS = ("vt", "niah_multikey_2", "niah_multivalue", "fwe", "moves", "association", "nth_note", "code")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
CURVE_SEED = 1
"""Offset of the seed for the prompts of the curve, which are not those of the scores."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `starling calibrate`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Finds out which KV heads of a model carry what Star Attention costs in answers, and writes their "
        "scores to a file. With `starling serve --star-heads FILE`, a tenth of the heads sees the whole prompt.",
        epilog="A prompt takes --steps forward and backward passes of the model: on one CPU core about 30 s for 135M "
        "parameters and 1,024 tokens. Exit code: 0 written, 2 unusable arguments, 130 interrupted; it then goes "
        "on by the same command. See docs/dense-heads.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with the model, or its name where the hub's cache has it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file of the scores, JSON")
    tasks = f"of {', '.join((*GROUPS, *TASKS))} (default: {','.join(DEFAULT_TASKS)}, unless --prompts is given)"
    add_options(parser, CalibrationOptions, tasks={"help": tasks})
    return parser


def run(argv: Sequence[str]) -> int:
    """Score the heads; returns the exit code: 0, 2 for unusable arguments, or 130."""
    args = make_parser().parse_args(argv)
    part = part_of(args.out)

    def calibrated() -> int:
        values = given_options(args, CalibrationOptions)
        if "tasks" not in values and "prompts" not in values:
            values["tasks"] = DEFAULT_TASKS
        calibrate(args.model, parse_options(CalibrationOptions, values), args.out, make_console())
        return 0

    def resume() -> str:
        kept = f"The scores so far are in {part}: the same command goes on from there."
        return kept if part.exists() else "Nothing is scored."

    return run_command(COMMAND, calibrated, resume, (ValueError, OSError))


def calibrate(name: str, options: CalibrationOptions, out: Path, console: Console) -> None:
    """Score the heads of a model, and write the file.

    Raises:
        ValueError: the model or a prompt can't be used.
    """
    folder = find_model(name)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out} is refused: the folder {out.parent} does not exist")
    made: dict[str, Any] = {"model": name, "checkpoint": checkpoint_digest(folder), "setup": options.setup()}
    with progress_bars(console) as progress:
        prompts = prompts_of(options, folder, progress)
        curve_options = options.model_copy(
            update={"prompt_seed": options.prompt_seed + CURVE_SEED, "prompts_per_cell": options.curve_prompts or 1}
        )
        of_curve = prompts_of(curve_options, folder, progress) if options.curve_prompts else []
        found = Found(part_of(out), {"model": name, "checkpoint": made["checkpoint"]} | options.setup(), progress)
        scorer = GradientScorer(GatedModel(folder, options.device, DTYPES[options.chosen_dtype]), options)
        result = HeadScores(scores=scorer.scores(found, prompts), **made)
        counts = sorted({result.count(share) for share in SHARES})
        measured = found.computed("curve", of_curve, lambda: scorer.measured(result, counts))
    means = torch.tensor(measured, dtype=torch.float64).mean(0).tolist() if measured else []
    curve = tuple((count / result.num_heads, value) for count, value in zip(counts, means, strict=False))
    write(out, result.model_copy(update={"curve": curve}))
    part_of(out).unlink(missing_ok=True)
    for line in summary(result, curve):
        console.print(line)
    console.print(f"written: {out}")


def prompts_of(options: CalibrationOptions, folder: Path, progress: Progress) -> list[ScoredPrompt]:
    """Return the prompts as tokens (raises ValueError)."""
    made = asyncio.run(make_prompts(options, LocalTokenizer(folder), progress))
    return [ScoredPrompt(prompt.name, prompt.token_ids, prompt.answer_ids) for prompt in made]


def write(out: Path, scores: HeadScores) -> None:
    """Write the scores with a line for each layer: a file that people can read and compare."""
    content = json.loads(scores.model_dump_json())
    rows = ",\n  ".join(json.dumps(row) for row in content.pop("scores"))
    head = json.dumps(content, indent=1)[:-2]
    replace_text(out, f'{head},\n "scores": [\n  {rows}\n ]\n}}\n')


def summary(scores: HeadScores, curve: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Yield the lines of a short summary of the scores."""
    highest = ", ".join(f"layer {layer} head {head}" for layer, head in scores.order[:5])
    positive = sum(score for row in scores.scores for score in row if score > 0)
    tenth = sum(scores.scores[layer][head] for layer, head in scores.order[: scores.count(0.1)])
    if positive > 0:
        yield f"{scores.num_heads} KV heads; a tenth of them carry {tenth / positive:.0%} of the loss"
    else:
        yield f"{scores.num_heads} KV heads; none carries a loss on these prompts"
    yield f"highest: {highest}"
    for share, value in curve:
        yield f"star_dense_heads={share:.3f}: {value:.4f} nats from dense"
