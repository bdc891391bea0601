"""Effect of the options of `starling distil` on an adapter: `python -m benchmarks.adapter_options MODEL`.

Trains an adapter with each set of options, on as many prompts, and measures what is left of the loss on the same
held-out prompts: of trained tasks, of text, and of tasks that no set trains on. Writes
results/adapter_options_MODEL.json and .png, a row of each set; --only trains some of them. A set takes 8 minutes with
the demo model on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.report import saved_figure, write_row
from starling.lab.distillation.adapted_model import AdaptedModel
from starling.lab.distillation.distil import task_cases
from starling.lab.distillation.distil_options import DistilOptions
from starling.lab.distillation.training import HeldOut, Training, losses
from starling.lab.evaluation.document_prompts import Encoder
from starling.lab.models import DTYPES
from starling.lab.statistics import mean_ratio

SHARED: dict[str, Any] = {"tokens": 640, "questions": 5, "rank": 6}
SETS: dict[str, dict[str, Any]] = {
    "rank 6": {},
    "rank 2": {"rank": 2},
    "rank 24": {"rank": 24},
    "attention alone, rank 16": {"modules": ("attention",), "rank": 16},
    "MLP alone, rank 8": {"modules": ("gate_proj", "up_proj", "down_proj"), "rank": 8},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 1e-4": {"learning_rate": 1e-4},
    "batch 4": {"batch": 4},
    "one question": {"questions": 1},
    "12 questions": {"questions": 12},
    "two tasks": {"tasks": ("niah_single_2", "vt")},
}
"""Name -> what is other than in SHARED."""


def train(model: AdaptedModel, encoder: Encoder, options: DistilOptions, prompts: int, name: str) -> Training:
    """Train on ``prompts`` prompts; the model has the average of the last steps then."""
    make, _ = task_cases(options, encoder)
    steps = prompts // options.batch
    training = Training(model, make, [], [], steps, options.batch, options.learning_rate)
    for _ in track(range(steps), description=name):
        training.make_step()
    training.use_average()
    return training


@torch.no_grad()
def losses_of(model: AdaptedModel, held: HeldOut, *, adapter: bool) -> np.ndarray:
    """Return (prompts,) KL from dense at the answers."""
    found = [losses(model, prompt, plan, adapter=adapter).answers.mean() for prompt, plan in held.cases]
    return torch.stack(found).cpu().numpy()


def show(rows: Sequence[dict[str, Any]], kinds: Sequence[str], path: Path) -> None:
    table = Table("options", "MB", "minutes", *kinds)
    for row in rows:
        lefts = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["left"][kind]) for kind in kinds]
        table.add_row(row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['seconds'] / 60:.1f}", *lefts)
    Console(width=120).print(table)
    with saved_figure(path, 1, len(kinds), figsize=(10, 0.4 * len(rows) + 1), sharey=True) as (_, axes):
        for axis, kind in zip(axes, kinds, strict=True):
            values = np.array([row["left"][kind] for row in rows])
            error = np.abs(values[:, 1:] - values[:, :1]).T
            axis.errorbar(values[:, 0], [row["name"] for row in rows], xerr=error, fmt="o", capsize=3)
            axis.axvline(1.0, color="grey", linestyle=":")
            axis.set_title(kind)
            axis.set_xlabel("left of the loss")
        axes[0].invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--trained", type=int, default=160, help="prompts that each set trains on (%(default)s)")
    parser.add_argument("--held-out", type=int, default=3, help="prompts of each kind that measure (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=SETS, default=[*SETS], metavar="NAME", help="sets to train")
    args = parser.parse_args()
    encoder = Encoder(AutoTokenizer.from_pretrained(args.model, local_files_only=True))
    usual = DistilOptions(**SHARED, held_out=args.held_out)
    _, held_out = task_cases(usual, encoder)
    for name in args.only:
        options = DistilOptions(**SHARED | SETS[name])
        torch.manual_seed(options.seed)
        config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=options.target_modules)
        model = AdaptedModel(args.model, options.device, DTYPES[options.chosen_dtype], config, recompute=False)
        before = {held.name: losses_of(model, held, adapter=False) for held in held_out}
        training = train(model, encoder, options, args.trained, name)
        left = {held.name: mean_ratio(losses_of(model, held, adapter=True), before[held.name]) for held in held_out}
        size = 2 * sum(parameter.numel() for parameter in model.parameters)
        row = {"name": name, "options": SETS[name], "left": left, "bytes": size, "seconds": training.seconds}
        row["trained"] = args.trained
        written = f"adapter_options_{args.model.name}"
        rows, path = write_row(written, "sets", row, ("name",), model=args.model.name, shared=SHARED)
        show(rows, [held.name for held in held_out], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
