"""`starling calibrate`: scores a model's KV heads, and writes the file that `--star-heads` reads."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from starling.config.head_scores import HeadScores
from starling.features.dense_heads.model_heads import checkpoint_digest, checkpoint_folder
from starling.lab.calibration.calibration_options import DTYPES, CalibrationOptions
from starling.lab.calibration.found import Found, part_of, replace_text
from starling.lab.calibration.gated_model import CalibrationError, GatedModel
from starling.lab.calibration.integrated_gradients import ScoredPrompt
from starling.lab.calibration.scorers import AblationScorer, GradientScorer
from starling.lab.evaluation.client import ServerError
from starling.lab.evaluation.commands.measuring import (
    FAILED,
    INTERRUPTED,
    UNUSABLE,
    comma,
    make_console,
    make_prompts,
    progress_bars,
    signals_as_interrupt,
)
from starling.lab.evaluation.prompt_options import parse_options
from starling.lab.evaluation.server_process import StartError
from starling.lab.evaluation.tasks import GROUPS, TASKS
from starling.lab.evaluation.tokenizer import LocalTokenizer

COMMAND = "starling calibrate"
DEFAULT_TASKS = ("vt", "niah_multikey_2", "niah_multivalue", "fwe", "moves", "association", "nth_note", "code")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
CURVE_SEED = 1
"""What is added to the seed for the prompts of the curve, which are not those of the scores."""


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling calibrate`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Finds out which KV heads of a model carry what Star Attention costs in answers, and writes their "
        "scores to a file. With `starling serve --star-heads FILE`, a tenth of the heads sees the whole prompt.",
        epilog="A prompt takes --steps forward and backward passes of the model: on one CPU core about 30 s for 135M "
        "parameters and 1,024 tokens. With --method ablation it takes --orders times --groups prefills, and all other "
        "options are those of `starling serve`. Exit code: 0 written, 1 the server failed, 2 unusable arguments, 130 "
        "interrupted; the same command then goes on. See docs/dense-heads.md.",
        allow_abbrev=False,
    )
    fields = CalibrationOptions.model_fields

    def add(name: str, **keywords: Any) -> None:
        field = fields[name]
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{field.description} (default: {shown})".replace(" (default: )", "").replace(" (default: None)", "")
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **({"help": text} | keywords))

    parser.add_argument(
        "model", metavar="MODEL", help="a folder with the model, or its name where the hub's cache has it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file of the scores, JSON")
    tasks = f"of {', '.join((*GROUPS, *TASKS))} (default: {','.join(DEFAULT_TASKS)}, unless --prompts is given)"
    add("tasks", type=comma, metavar="A,B", help=tasks)
    add("lengths", type=comma, metavar="N,M")
    add("method", choices=("gradient", "ablation"))
    for name in ("prompts_per_cell", "prompt_seed", "max_tokens", "curve_prompts", "blocks", "query_tokens"):
        add(name, type=int, metavar="N")
    for name in ("steps", "orders", "groups"):
        add(name, type=int, metavar="N")
    add("prompts", type=Path, metavar="FILE")
    add("prompt_format", choices=("chat", "text"))
    add("device", metavar="DEVICE")
    add("dtype", choices=("auto", *DTYPES))
    return parser


def run(argv: Sequence[str]) -> int:
    """Score the heads; returns the exit code: 0, 1 where a server failed, 2 for unusable arguments, or 130."""
    args, serve_options = make_parser().parse_known_args(argv)
    console = make_console()
    try:
        values = {name: value for name, value in vars(args).items() if name in CalibrationOptions.model_fields}
        if "tasks" not in values and "prompts" not in values:
            values["tasks"] = DEFAULT_TASKS
        options = parse_options(CalibrationOptions, values | {"serve_options": tuple(serve_options)})
        with signals_as_interrupt():
            calibrate(args.model, options, args.out, console)
    except (ValueError, OSError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return UNUSABLE
    except (ServerError, StartError) as error:
        print(f"{COMMAND}: error: {error}\nThe same command goes on from there.", file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        part = part_of(args.out)
        kept = f"The scores so far are in {part}: the same command goes on." if part.exists() else "Nothing is scored."
        print(f"{COMMAND}: interrupted\n{kept}", file=sys.stderr)
        return INTERRUPTED
    return 0


def calibrate(name: str, options: CalibrationOptions, out: Path, console: Console) -> None:
    """Score the heads of a model, and write the file.

    Raises:
        ValueError: the model or a prompt can't be used.
        ServerError, StartError: with --method ablation.
    """
    folder = checkpoint_folder(name, None)
    if folder is None:
        hint = " (MODEL comes before the options of a server)" if options.serve_options else ""
        reason = f"it is no folder, and the hub's cache has no such model{hint}"
        raise CalibrationError(f"MODEL={name!r} is refused: {reason}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out} is refused: the folder {out.parent} does not exist")
    log = out.with_name(f"{out.name}.log")
    made: dict[str, Any] = {"model": name, "checkpoint": checkpoint_digest(folder), "setup": options.setup()}
    with progress_bars(console) as progress:
        prompts = prompts_of(options, folder, progress)
        curve_options = options.model_copy(
            update={"prompt_seed": options.prompt_seed + CURVE_SEED, "prompts_per_cell": options.curve_prompts or 1}
        )
        of_curve = prompts_of(curve_options, folder, progress) if options.curve_prompts else []
        found = Found(part_of(out), {"model": name, "checkpoint": made["checkpoint"]} | options.setup(), progress)
        scorer: GradientScorer | AblationScorer
        if options.method == "gradient":
            scorer = GradientScorer(GatedModel(folder, options.device, DTYPES[options.chosen_dtype]), options)
        else:
            scorer = AblationScorer(folder, made, options, log)
        result = HeadScores(scores=scorer.scores(found, prompts), **made)
        counts = sorted({result.count(share) for share in SHARES})
        measured = found.computed("curve", of_curve, lambda: scorer.measured(result, counts))
    means = torch.tensor(measured, dtype=torch.float64).mean(0).tolist() if measured else []
    curve = tuple((count / result.num_heads, value) for count, value in zip(counts, means, strict=False))
    write(out, result.model_copy(update={"curve": curve}))
    for path in (part_of(out), log):
        path.unlink(missing_ok=True)
    for line in summary(result, curve):
        console.print(line)
    console.print(f"written: {out}")


def prompts_of(options: CalibrationOptions, folder: Path, progress: Progress) -> list[ScoredPrompt]:
    """The prompts as tokens (raises ValueError)."""
    made = asyncio.run(make_prompts(options, LocalTokenizer(folder), progress))
    return [ScoredPrompt(prompt.name, prompt.token_ids, prompt.answer_ids) for prompt in made]


def write(out: Path, scores: HeadScores) -> None:
    """A line for each layer: a file that people can read and compare."""
    content = json.loads(scores.model_dump_json())
    rows = ",\n  ".join(json.dumps(row) for row in content.pop("scores"))
    head = json.dumps(content, indent=1)[:-2]
    replace_text(out, f'{head},\n "scores": [\n  {rows}\n ]\n}}\n')


def summary(scores: HeadScores, curve: Sequence[tuple[float, float]]) -> Iterator[str]:
    """What was found, in a few lines."""
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
