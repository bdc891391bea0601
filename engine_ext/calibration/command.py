"""`starling calibrate`: scores a model's KV heads, and writes the file that `--star-heads` reads."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from starling.config.head_scores import HeadScores
from starling.engine_ext.calibration.gated_model import CalibrationError, GatedModel
from starling.engine_ext.calibration.scoring import Case, ScoredPrompt
from starling.engine_ext.head_scores import checkpoint_digest, checkpoint_folder
from starling.evaluation.commands.measuring import (
    INTERRUPTED,
    UNUSABLE,
    comma,
    make_console,
    make_prompts,
    progress_bars,
)
from starling.evaluation.prompt_options import Length, PromptOptions, parse_options
from starling.evaluation.tasks import GROUPS, TASKS
from starling.evaluation.tokenizer import LocalTokenizer

COMMAND = "starling calibrate"
DEFAULT_TASKS = ("vt", "niah_multikey_2", "niah_multivalue", "fwe", "moves", "association", "nth_note", "code")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CURVE_SEED = 1
"""What is added to the seed for the prompts of the curve, which are not those of the scores."""


class CalibrationOptions(PromptOptions):
    """What is scored, on which prompts, and how."""

    lengths: tuple[Length, ...] = Field((1024,), min_length=1, description="tokens of a prompt and its answer")
    prompts_per_cell: int = Field(2, ge=1, description="prompts of each task and length")
    prompt_seed: int = Field(100, description="of the tasks' prompts")
    blocks: int = Field(16, ge=2, description="star blocks that a prompt is cut into")
    query_tokens: int = Field(128, ge=1, description="of the prompt's end, which see the whole prompt")
    steps: int = Field(3, ge=1, description="points between star and dense at which the gradient is taken")
    curve_prompts: int = Field(1, ge=0, description="prompts of each task and length for the curve; 0: no curve")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the computation; auto: bfloat16 on GPUs, float32 on CPUs, most of which are slow in it"
    )

    @property
    def chosen_dtype(self) -> str:
        auto = "float32" if self.device == "cpu" else "bfloat16"
        return auto if self.dtype == "auto" else self.dtype

    def setup(self) -> dict[str, Any]:
        """What decides the scores, as JSON."""
        own = {name: getattr(self, name) for name in ("blocks", "query_tokens", "steps")}
        return self.prompts_setup() | own | {"dtype": self.chosen_dtype}


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling calibrate`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Finds out which KV heads of a model carry what Star Attention costs in answers, and writes their "
        "scores to a file. With `starling serve --star-heads FILE`, a tenth of the heads sees the whole prompt.",
        epilog="A prompt takes --steps forward and backward passes of the model: on one CPU core about 30 s for 135M "
        "parameters and 1,024 tokens. Exit code: 0 written, 2 unusable arguments, 130 interrupted; the same command "
        "then goes on. See docs/dense-heads.md.",
        allow_abbrev=False,
    )
    fields = CalibrationOptions.model_fields

    def add(name: str, **keywords: Any) -> None:
        field = fields[name]
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{field.description} (default: {shown})".replace(" (default: )", "").replace(" (default: None)", "")
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, **({"help": text} | keywords))

    parser.add_argument(
        "model", metavar="MODEL", help="a folder with the model, or its name where the hub's cache has it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file of the scores, JSON")
    tasks = f"of {', '.join((*GROUPS, *TASKS))} (default: {','.join(DEFAULT_TASKS)}, unless --prompts is given)"
    add("tasks", type=comma, metavar="A,B", help=tasks)
    add("lengths", type=comma, metavar="N,M")
    for name in ("prompts_per_cell", "prompt_seed", "max_tokens", "blocks", "query_tokens", "steps", "curve_prompts"):
        add(name, type=int, metavar="N")
    add("prompts", type=Path, metavar="FILE")
    add("prompt_format", choices=("chat", "text"))
    add("device", metavar="DEVICE")
    add("dtype", choices=("auto", *DTYPES))
    return parser


def run(argv: Sequence[str]) -> int:
    """Score the heads; returns the exit code: 0, 2 for unusable arguments, or 130."""
    args, console = make_parser().parse_args(argv), make_console()
    try:
        values = {name: getattr(args, name) for name in CalibrationOptions.model_fields}
        if not values["tasks"] and values["prompts"] is None:
            values["tasks"] = DEFAULT_TASKS
        calibrate(args.model, parse_options(CalibrationOptions, values), args.out, console)
    except (ValueError, OSError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        part = part_of(args.out)
        kept = f"The scores so far are in {part}: the same command goes on." if part.exists() else "Nothing is scored."
        print(f"{COMMAND}: interrupted\n{kept}", file=sys.stderr)
        return INTERRUPTED
    return 0


def calibrate(name: str, options: CalibrationOptions, out: Path, console: Console) -> None:
    """Score the heads of a model, and write the file (raises ValueError: the model or a prompt can't be used)."""
    folder = checkpoint_folder(name, None)
    if folder is None:
        raise CalibrationError(f"MODEL={name!r} is refused: it is no folder, and the hub's cache has no such model")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out} is refused: the folder {out.parent} does not exist")
    checkpoint = checkpoint_digest(folder)
    setup = {"model": name, "checkpoint": checkpoint} | options.setup()
    with progress_bars(console) as progress:
        prompts = prompts_of(options, folder, progress)
        curve_options = options.model_copy(
            update={"prompt_seed": options.prompt_seed + CURVE_SEED, "prompts_per_cell": options.curve_prompts or 1}
        )
        of_curve = prompts_of(curve_options, folder, progress) if options.curve_prompts else []
        model = GatedModel(folder, options.device, DTYPES[options.chosen_dtype])
        found = Found(part_of(out), setup)

        def computed(kind: str, prompts: Sequence[ScoredPrompt], compute: Callable[[Case], Any]) -> list[Any]:
            """A value for each prompt; those that an earlier run found are not computed again."""
            missing = found.missing(kind, prompts)
            bar = progress.add_task(kind, total=len(prompts), completed=len(prompts) - len(missing))
            for prompt in missing:
                value = compute(Case(model, prompt, options.blocks, options.query_tokens))
                if not torch.tensor(value).isfinite().all():
                    reason = f"in {options.chosen_dtype} its results are not finite numbers"
                    raise CalibrationError(f"the prompt {prompt.name} can't be scored: {reason}. Try --dtype float32")
                found.add(kind, prompt.name, value)
                progress.advance(bar)
            return [found.values[kind][prompt.name] for prompt in prompts]

        scores = mean(computed("scores", prompts, lambda case: case.scores(options.steps).tolist()), model.is_full)
        result = HeadScores(scores=scores, model=name, checkpoint=checkpoint, setup=options.setup())
        counts = sorted({result.count(share) for share in SHARES})
        measured = computed("curve", of_curve, lambda case: list(case.divergences(result.order, counts)))
    means = torch.tensor(measured, dtype=torch.float64).mean(0).tolist() if measured else []
    curve = tuple((count / result.num_heads, value) for count, value in zip(counts, means, strict=False))
    write(out, result.model_copy(update={"curve": curve}))
    part_of(out).unlink(missing_ok=True)
    for line in summary(result, curve):
        console.print(line)
    console.print(f"written: {out}")


def prompts_of(options: CalibrationOptions, folder: Path, progress: Progress) -> list[ScoredPrompt]:
    """The prompts as tokens (raises ValueError)."""
    made = asyncio.run(make_prompts(options, LocalTokenizer(folder), progress))
    return [ScoredPrompt(prompt.name, prompt.token_ids, prompt.answer_ids) for prompt in made]


def part_of(out: Path) -> Path:
    """The file of what is scored so far."""
    return out.with_name(f"{out.name}.part")


class Found:
    """What is computed so far, in a file: "scores" and "curve" by the names of prompts.

    Raises:
        ValueError: the file is of another model or of other options.
    """

    def __init__(self, path: Path, setup: dict[str, Any]) -> None:
        self.path, self.setup = path, setup
        self.values: dict[str, dict[str, Any]] = {"scores": {}, "curve": {}}
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                known, self.values = content["setup"], {kind: dict(content["values"][kind]) for kind in self.values}
            except (ValueError, LookupError, TypeError):
                known = None
            if known != json.loads(json.dumps(setup)):
                raise ValueError(
                    f"{path} has scores of another model or other options: remove it, or take another --out"
                )

    def missing(self, kind: str, prompts: Sequence[ScoredPrompt]) -> list[ScoredPrompt]:
        return [prompt for prompt in prompts if prompt.name not in self.values[kind]]

    def add(self, kind: str, name: str, value: Any) -> None:
        self.values[kind][name] = value
        replace_text(self.path, json.dumps({"setup": self.setup, "values": self.values}))


def mean(scores: Sequence[list[list[float]]], is_full: Sequence[bool]) -> tuple[tuple[float, ...], ...]:
    """The scores of all prompts as one; none for layers that are not full attention."""
    rows = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    return tuple(
        tuple(float(f"{score:.4g}") for score in row) if full else () for row, full in zip(rows, is_full, strict=True)
    )


def write(out: Path, scores: HeadScores) -> None:
    """A line for each layer: a file that people can read and compare."""
    content = json.loads(scores.model_dump_json())
    rows = ",\n  ".join(json.dumps(row) for row in content.pop("scores"))
    head = json.dumps(content, indent=1)[:-2]
    replace_text(out, f'{head},\n "scores": [\n  {rows}\n ]\n}}\n')


def replace_text(path: Path, text: str) -> None:
    """Write a file at once, so that an interrupted process leaves the old one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


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
