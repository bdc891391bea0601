"""What Star Attention costs a model in answers: a short `starling eval`, in a process of its own."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from starling.lab.selftest.engine_run import environment_of_engines, run_python
from starling.lab.selftest.result import Check, Result, Skip

TASKS = "niah_multikey_1,vt,moves,nth_note"
PLAN = "n/8"
PROMPTS = {True: 10, False: 1}  # of each task, by whether there is a GPU
LENGTH = {True: 16_384, False: 1_024}
SHORTEST = 1_024
ROOM = 1_024  # tokens of the server's max_model_len above the prompts: of chat templates
TIMEOUT = 1_200
NO_MODEL = "no MODEL: random weights have no answers"
NO_TOKENIZER = "MODEL has no tokenizer"


def accuracy_check(
    model: str | None, max_length: int, gpu: bool, folder: Path, backend: str | None, gpu_attention: str | None
) -> Check:
    """The measurement for a model.

    Args:
        max_length: tokens that the model takes.
        folder: of `starling eval`, which goes on where an earlier run ended.
        backend, gpu_attention: options of the server; None for their defaults.
    """
    name, length = f"accuracy: points that star costs, {PLAN}", min(LENGTH[gpu], max_length - ROOM)
    if model is None:
        return Check(name, functools.partial(Skip, NO_MODEL))
    if length < SHORTEST:
        return Check(name, functools.partial(Skip, f"the model takes {max_length:,} tokens at most"))
    options = ["--max-model-len", str(length + ROOM)]
    options += [] if gpu else ["--enforce-eager"]  # as the engine checks run on a CPU
    options += ["--attention-backend", backend] if backend else []
    options += ["--gpu-attention", gpu_attention] if gpu_attention else []
    return Check(name, functools.partial(measure_accuracy, model, length, PROMPTS[gpu], folder, options))


def measure_accuracy(model: str, length: int, prompts: int, folder: Path, serve_options: list[str]) -> Result | Skip:
    """By how many points of 100 the answers under a star plan score below those under dense attention.

    Raises:
        EngineError: `starling eval` fails; the message has the last lines that it printed.
    """
    prompt_format = format_of(model)
    if prompt_format is None:
        return Skip(NO_TOKENIZER)
    arguments = ["-m", "starling.engine_ext.serving.cli.ended_with_parent", str(os.getpid()), "eval", model]
    arguments += [*serve_options, "--tasks", TASKS, "--lengths", str(length), "--prompts-per-cell", str(prompts)]
    arguments += ["--plan", PLAN, "--prompt-format", prompt_format, "--concurrency", "4", "--out", str(folder)]
    run_python("starling eval", arguments, TIMEOUT, environment_of_engines())
    return cost(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def format_of(model: str) -> str | None:
    """How prompts are sent: "chat" where the model has a template, else "text"; None without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        return "chat" if AutoTokenizer.from_pretrained(model).chat_template else "text"
    except (OSError, ValueError):
        return None


def cost(results: dict[str, Any]) -> Result:
    """The cost in the results of `starling eval`, over all tasks."""
    *tasks, total = results["cells"]
    mean, low, high = (0.0 - 100 * total["difference"][name] for name in ("mean", "high", "low"))
    scores = ", ".join(f"{one['task']} {100 * one['dense_score']:.0f} to {100 * one['score']:.0f}" for one in tasks)
    detail = (
        f"dense {100 * total['dense_score']:.1f}, star {100 * total['score']:.1f} of 100, 95 % of the cost in "
        f"[{low:.1f}, {high:.1f}]; {total['prompts']} prompts of {tasks[0]['length']:,} tokens: {scores}; "
        f"{100 * total['attended_keys']:.0f} % of dense's attention work"
    )
    return Result(mean, None, "points", detail)
