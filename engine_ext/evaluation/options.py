"""What an evaluation measures. A folder of results belongs to one such setup."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine_ext.evaluation.plans import Plan, parse_plan, with_dense
from engine_ext.evaluation.prompts import Format, read_own_prompts
from engine_ext.evaluation.tasks import Task, choose_tasks

SETUP_VERSION = 1
Length = Annotated[int, Field(ge=256)]


class EvalOptions(BaseModel):
    """The options of `starling eval` that decide what is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field((), description="tasks by name, or groups")
    lengths: tuple[Length, ...] = Field((4096,), min_length=1, description="tokens of a prompt and its answer")
    prompts_per_cell: int = Field(20, ge=1, description="prompts of each task and length")
    prompts: Path | None = Field(None, description="the user's own prompts, in place of tasks")
    max_tokens: int = Field(128, ge=1, description="of answers to the user's own prompts; tasks have their own")
    plans: tuple[str, ...] = Field((), description="plans beside dense")
    prompt_format: Format = Field("chat", description="chat: with the model's chat template; text: without")
    prompt_seed: int = Field(0, description="of the tasks' prompts")
    logprobs: int = Field(0, ge=0, description="tokens of the answer at which the distributions are compared")

    @property
    def chosen_tasks(self) -> list[Task]:
        return choose_tasks(self.tasks)

    @property
    def all_plans(self) -> list[Plan]:
        """Dense, and then the others."""
        return with_dense(map(parse_plan, self.plans))

    def check(self) -> EvalOptions:
        """These options.

        Raises:
            ValueError: a task, a plan or a file of prompts that can't be used, or not exactly one of tasks and prompts.
        """
        if bool(self.tasks) == (self.prompts is not None):
            raise ValueError("either --tasks or --prompts is needed, and not both")
        _ = self.chosen_tasks, self.all_plans, self.prompts and read_own_prompts(self.prompts)
        return self

    def setup(self, model: str) -> dict[str, Any]:
        """What all results in a folder have in common, as JSON."""
        setup: dict[str, Any] = {
            "version": SETUP_VERSION,
            "model": model,
            "plans": {plan.name: plan.options for plan in self.all_plans},
            "logprobs": self.logprobs,
        }
        if self.prompts is not None:
            content = hashlib.sha256(self.prompts.read_bytes()).hexdigest()
            return setup | {"prompts_sha256": content, "max_tokens": self.max_tokens}
        return setup | {
            "tasks": [task.name for task in self.chosen_tasks],
            "lengths": list(self.lengths),
            "prompts_per_cell": self.prompts_per_cell,
            "prompt_format": self.prompt_format,
            "prompt_seed": self.prompt_seed,
        }

    def command(self, target: Sequence[str]) -> str:
        """The command that measures the same.

        Args:
            target: the arguments that name the server or the model to serve.
        """
        parts = ["starling", "eval", *without_secrets(target)]
        for plan in self.plans:
            parts += ["--plan", plan]
        if self.prompts is not None:
            parts += ["--prompts", str(self.prompts), "--max-tokens", str(self.max_tokens)]
        else:
            parts += ["--tasks", ",".join(self.tasks), "--lengths", ",".join(map(str, self.lengths))]
            parts += ["--prompts-per-cell", str(self.prompts_per_cell), "--prompt-format", self.prompt_format]
            parts += ["--prompt-seed", str(self.prompt_seed)]
        parts += ["--logprobs", str(self.logprobs), "--out", "DIR"]
        return shlex.join(parts)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments with `...` for the values of options whose names say that they are secret, such as --hf-token."""
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = name.startswith("--") and any(word in name for word in ("token", "key", "password"))
        if hide and not argument.startswith("--"):
            shown.append("...")
        else:
            shown.append(f"{name}=..." if secret and equals else argument)
        hide = secret and not equals
    return shown


def parse_options(values: dict[str, Any]) -> EvalOptions:
    """Options from a command line.

    Raises:
        ValueError: with the option, its value and what is allowed.
    """
    try:
        return EvalOptions(**values).check()
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}={first['input']!r} is refused: {first['msg']}") from None
