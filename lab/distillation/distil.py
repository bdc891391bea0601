"""`starling distil`: trains an adapter with which a model reads documents, or star blocks, as with dense attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from starling.attention_backends.star.model_heads import checkpoint_digest
from starling.config.adapter import DISTILLED, PURPOSES, VERSION
from starling.lab.command_line import add_options, given_options, make_console, progress_bars, run_command
from starling.lab.distillation.adapted_model import AdaptedModel
from starling.lab.distillation.distil_options import GIB, DistilOptions, needed_bytes
from starling.lab.distillation.training import DENSE_SHARE, HeldOut, Training, plan_for
from starling.lab.distillation.training_prompts import (
    FUNCTIONS,
    OWN,
    TEXT,
    TRAINED_TASKS,
    TaskPrompts,
    read_prompts,
    with_answers,
    with_recalls,
)
from starling.lab.evaluation.document_prompts import DocumentPrompt, Encoder, Style
from starling.lab.evaluation.prompt_options import parse_options
from starling.lab.evaluation.store import RESULTS, locked
from starling.lab.evaluation.tasks import GROUPS, TASKS
from starling.lab.models import DTYPES, ModelError, find_model
from starling.scheduler.planning.plan import StarPlan

COMMAND = "starling distil"
STATE = "training.pt"
OTHER_TASKS = ("nth_note", "niah_multivalue")
"""Tasks whose held-out prompts show what an adapter does for questions that it was not trained on."""

OTHER = "other tasks"

MEMORY_SHARE = 0.7
NO_PEFT = "it needs PEFT, which writes adapters: pip install 'vllm-starling[distil]', or peft"

Case = tuple[DocumentPrompt, StarPlan]
Trained = tuple[DocumentPrompt, StarPlan | None]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `starling distil`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Trains a LoRA adapter with which a model reads documents (star_segments), or star blocks, as if "
        "they had seen one another: the model itself, with dense attention, is the teacher, so that no labels are "
        "needed. Serve it with `starling serve MODEL --star-adapter DIR`.",
        epilog="A step of a prompt of 1,024 tokens takes about 2 s for 135M parameters and 6 s for 0.5B on two cores "
        "that multiply in bfloat16. Exit code: 0 written, 2 unusable arguments, 130 interrupted; the same command then "
        "goes on. See docs/adapter.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with the model, or its name where the hub's cache has it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the adapter")
    tasks = f"of {', '.join((*GROUPS, *TASKS))} (default: {','.join(TRAINED_TASKS)}, unless --prompts is given)"
    add_options(parser, DistilOptions, purposes={"flag": "--for"}, tasks={"help": tasks})
    return parser


def run(argv: Sequence[str]) -> int:
    """Train an adapter; returns the exit code: 0, 2 for unusable arguments, or 130."""
    args = make_parser().parse_args(argv)

    def distilled() -> int:
        options = parse_options(DistilOptions, given_options(args, DistilOptions))
        with locked(args.out):
            distil(args.model, options, args.out, make_console())
        return 0

    resume = "The same command goes on from the last measurement."
    return run_command(COMMAND, distilled, lambda: resume, (ValueError, OSError))


def distil(name: str, options: DistilOptions, out: Path, console: Console) -> None:
    """Train an adapter of a model, and write it to a folder (raises ValueError: model or prompts are unusable)."""
    folder = find_model(name)
    try:
        from peft import LoraConfig
    except ImportError:
        raise ModelError(NO_PEFT) from None
    from transformers import AutoTokenizer

    checkpoint = checkpoint_digest(folder)
    options = options.with_start(checkpoint)
    torch.manual_seed(options.seed)
    needed = {on: needed_bytes(folder, options, recompute=on) for on in (False, True)}
    available = memory_of(options.device)
    recompute = options.recompute == "on" or (options.recompute == "auto" and needed[False] > MEMORY_SHARE * available)
    console.print(
        f"{options.steps} steps in {options.chosen_dtype} on {options.device}, about {needed[recompute] / GIB:.1f} GiB "
        f"of memory of {available / GIB:.1f} GiB{', layers computed again for the gradients' if recompute else ''}"
    )
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=options.target_modules)
    model = AdaptedModel(folder, options.device, DTYPES[options.chosen_dtype], config, recompute)
    if "documents" in options.purposes:
        model.check_rotation()
    if options.start is not None:
        model.load(options.start)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    made = {"model": name, "checkpoint": checkpoint, "setup": options.setup()}
    make, held_out = all_cases(options, encoder, model)
    counted = [each.name for each in held_out if each.name != OTHER]
    training = Training(model, make, held_out, counted, options.steps, options.batch, options.learning_rate)
    training.restore(out / STATE, made)
    with progress_bars(console) as progress:
        train(training, options.evaluations, lambda: training.store(out / STATE, made), progress)
    training.use_best()
    write(out, model, made | result_of(training, options))
    for file in (STATE, RESULTS):  # RESULTS is the file by which a folder is locked
        (out / file).unlink(missing_ok=True)
    for line in summary(training):
        console.print(line)
    console.print(f"written: {out}. Serve it: starling serve {name} --star-adapter {out}")


def memory_of(device: str) -> int:
    """Return the bytes of memory that are free on a device."""
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]


def all_cases(
    options: DistilOptions, encoder: Encoder, model: AdaptedModel
) -> tuple[Callable[[int], Trained], list[HeldOut]]:
    """Return a function that makes training prompts, in turns where they are of two sources, and the held-out ones."""
    sources = [task_cases(options, encoder)] if options.has_tasks else []
    sources += [own_cases(options, encoder, model)] if options.prompts else []

    def make(number: int) -> Trained:
        turn, which = divmod(number, len(sources))
        return sources[which][0](turn)

    return make, [held for _, held_out in sources for held in held_out]


def task_cases(options: DistilOptions, encoder: Encoder) -> tuple[Callable[[int], Trained], list[HeldOut]]:
    """Return a function that makes training prompts of tasks and plain text, and the held-out ones."""
    sizes = (options.tokens // 3, options.tokens)

    def prompts(seed: str, tasks: Sequence[str]) -> TaskPrompts:
        return TaskPrompts(encoder, tuple(tasks), sizes, options.questions, f"{options.seed}/{seed}")

    training = prompts("training", options.tasks)

    def make(number: int) -> Trained:
        return sometimes_dense(with_plan(training.make(number), options, number), options, number)

    def held(name: str, kinds: Sequence[str], known: Sequence[str]) -> HeldOut:
        source = prompts("held out", known)
        made = [source.make(number, kind) for kind in kinds for number in range(options.held_out)]
        first = [DocumentPrompt(each.task, each.head, each.documents, each.asked[:1]) for each in made]
        return HeldOut(name, [with_plan(prompt, options, number) for number, prompt in enumerate(first)])

    others = [task for task in OTHER_TASKS if task not in options.tasks]
    groups = [held("tasks", options.tasks, options.tasks), held("text", [TEXT, FUNCTIONS], options.tasks)]
    return make, groups + ([held(OTHER, others, others)] if others else [])


def own_cases(
    options: DistilOptions, encoder: Encoder, model: AdaptedModel
) -> tuple[Callable[[int], Trained], list[HeldOut]]:
    """Return a function that makes training prompts of the user's own, and the held-out ones (raises ValueError)."""
    assert options.prompts is not None
    found = read_prompts(options.prompts, options.segments, encoder, options.answer_tokens, options.questions)
    count = min(options.held_out * len(options.tasks), max(len(found) // 5, 1))
    held, trained = found[:count], found[count:]
    if not trained:
        raise ModelError(
            f"prompts={str(options.prompts)!r} is refused: it has questions about the same documents alone. Allowed: "
            "two prompts or more"
        )

    @cache
    def answered(prompt: DocumentPrompt) -> DocumentPrompt:
        return with_answers(prompt, model, options.answer_tokens, encoder.tokenizer.eos_token_id)

    def make(number: int) -> Trained:
        rng = Random(f"{options.seed}/own/{number // len(trained)}")
        prompt = answered(rng.sample(trained, len(trained))[number % len(trained)])
        more = with_recalls(
            prompt, encoder, Style(system=""), Random(f"{options.seed}/own/{number}"), options.questions
        )
        return sometimes_dense(with_plan(more, options, number), options, number)

    cases = [with_plan(answered(prompt), options, number) for number, prompt in enumerate(held)]
    return make, [HeldOut(OWN, cases)]


def with_plan(prompt: DocumentPrompt, options: DistilOptions, number: int) -> Case:
    """Return a prompt with the plan of one of the adapter's purposes."""
    rng = Random(f"{options.seed}/{number}/plan")
    return prompt, plan_for(rng.choice(options.purposes), prompt, rng)


def sometimes_dense(case: Case, options: DistilOptions, number: int) -> Trained:
    """Return the case, or its prompt with dense attention, by its number."""
    prompt, plan = case
    return prompt, None if Random(f"{options.seed}/{number}/dense").random() < DENSE_SHARE else plan


def train(training: Training, evaluations: int, store: Callable[[], None], progress: Progress) -> None:
    """Train until the last step, or until the held-out loss falls no more (raises ModelError)."""
    bar = progress.add_task("steps", total=training.steps, completed=training.step)
    borders = {round(training.steps * number / evaluations) for number in range(1, evaluations + 1)} - {0}
    if not training.curve:
        training.measure()
    while training.step < training.steps and not training.falls_no_more:
        loss = training.make_step()
        progress.update(bar, completed=training.step, description=f"steps, loss {loss:.3f}")
        if training.step in borders:
            training.measure()
            store()
            progress.console.print(line_of(training, -1))


def line_of(training: Training, place: int) -> str:
    """Return a measurement in a line: the share of the loss that is left."""
    first, found = training.curve[0]["loss"], training.curve[place]
    left = ", ".join(f"{name} {found['loss'][name] / max(first[name], 1e-9):.2f}" for name in first)
    return f"step {found['step']}: of the loss without the adapter are left: {left}"


def summary(training: Training) -> Iterator[str]:
    """Yield the lines of a short summary of the training."""
    place = min(range(1, len(training.curve)), key=training.mean)
    yield f"the best adapter is that of step {training.curve[place]['step']}"
    for name, value in training.curve[0]["loss"].items():
        found = training.curve[place]["loss"][name]
        yield f"{name}: {value:.4f} nats from dense without it, {found:.4f} with it"


def result_of(training: Training, options: DistilOptions) -> dict[str, Any]:
    """Return the fields of DISTILLED beside those of the model."""
    return {
        "version": VERSION,
        "purposes": [purpose for purpose in PURPOSES if purpose in options.purposes],
        "curve": training.curve,
        "seconds": round(training.seconds, 1),
        "steps": training.step,
        "versions": {name: version(name) for name in ("vllm-starling", "peft", "torch", "transformers")},
    }


def write(out: Path, model: AdaptedModel, made: dict[str, Any]) -> None:
    """Write PEFT's files, in the dtype of the model, and DISTILLED."""
    for parameter in model.parameters:
        parameter.data = parameter.data.to(model.dtype)
    model.model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's, a form to fill in
    (out / DISTILLED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
