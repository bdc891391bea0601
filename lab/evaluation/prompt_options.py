"""Options that say what a command measures: the plans that it compares, and on which prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from starling.config import star
from starling.lab.evaluation.prompts import Format, read_own_prompts
from starling.lab.evaluation.store import SERVER_OPTIONS
from starling.lab.evaluation.tasks import GROUPS, TASKS, Task, choose_tasks

LETTERS = {
    "B": "star_block_size",
    "A": "star_anchor_size",
    "O": "star_overlap_size",
    "H": "star_dense_heads",
    "Q": "star_query_tokens",
    "S": "star_segments",
    "L": "star_adapter",
}
ALLOWED = (
    "dense; default, the server's own star options; n/8, eight star blocks; or sizes in tokens such as "
    "B=1024,A=1024,O=0,Q=128; behind either H=0.1, the share of dense KV heads, S= with the text of the token that "
    "starts a document, and L=off, without the server's adapter"
)


@dataclass(frozen=True)
class Plan:
    """Plan by which the prompts are prefilled.

    Attributes:
        name: name in tables, results and errors.
        options: the star options of a request, under their flat names (`vllm_xargs`).
    """

    name: str
    options: dict[str, str | int] = dataclasses.field(hash=False)

    @property
    def is_dense(self) -> bool:
        return self.options["star"] == "off"


DENSE = Plan("dense", {"star": "off"})


def parse_plan(text: str) -> Plan:
    """Parse the plan of one --plan.

    Args:
        text: ``dense``; ``default``; or parts with a comma between them: ``n/8`` or ``B=n/8``; ``B=``, ``A=``, ``O=``,
            ``Q=`` and a number of tokens; ``H=`` and a share of the KV heads; ``S=`` and the text of the token that
            starts a document; ``L=off``, without the server's adapter.

    Raises:
        ValueError: the text is no plan, or its options contradict one another.
    """

    def refused(reason: str) -> ValueError:
        return ValueError(f"plan={text!r} is refused: {reason}. Allowed: {ALLOWED}.")

    if text == DENSE.name:
        return DENSE
    options: dict[str, str | int] = {"star": "on"}
    for part in text.split(",") if text != "default" else ():
        letter, equals, value = ("B", "=", part) if part.startswith("n/") else part.strip().partition("=")
        if letter not in LETTERS or not equals:
            raise refused(f"{part!r} is no option of a plan")
        if LETTERS[letter] in options:
            raise refused(f"{letter} is given twice")
        options[LETTERS[letter]] = int(value) if value.isascii() and value.isdigit() else value
    try:
        star.parse_options(options)
    except ValueError as error:
        raise ValueError(f"plan={text!r}: {error}") from None
    return Plan(text, options)


def with_dense(plans: Iterable[Plan]) -> list[Plan]:
    """Return dense, and then the other plans, each once.

    Raises:
        ValueError: two plans have the same name, or the same options.
    """
    found = [DENSE]
    for plan in plans:
        if plan == DENSE:
            continue
        for other in found:
            if plan.name == other.name:
                raise ValueError(f"plan={plan.name!r} is refused: it is given twice. Allowed: each plan once.")
            if plan.options == other.options:
                raise ValueError(
                    f"plan={plan.name!r} is refused: it is the same plan as {other.name}. Allowed: each plan once."
                )
        found.append(plan)
    return found


SETUP_VERSION = 1
DEFAULT_MAX_TOKENS = 128
SECRET_WORDS = {"token", "key", "password"}
OF_TASKS = ("tasks", "lengths", "prompts_per_cell", "prompt_format", "prompt_seed")
OF_OWN_PROMPTS = ("max_tokens",)
Length = Annotated[int, Field(ge=256)]
Options = TypeVar("Options", bound="CommandOptions")


class CommandOptions(BaseModel):
    """The options of a command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def check(self) -> None:
        """Refuse what can't be used, beyond the types of single options (raises ValueError)."""


class PromptOptions(CommandOptions):
    """The options that decide on which prompts a command measures."""

    subcommand: ClassVar[str]
    """Subcommand of `starling` that has these options."""

    tasks: tuple[str, ...] = Field((), description=f"of {', '.join((*GROUPS, *TASKS))}; niah: all niah_...")
    lengths: tuple[Length, ...] = Field((4096,), min_length=1, description="tokens of a prompt and its answer")
    prompts_per_cell: int = Field(20, ge=1, description="prompts of each task and length")
    prompts: Path | None = Field(None, description="your own prompts as JSONL, in place of tasks")
    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS, ge=1, description="of answers to your own prompts; tasks have their own"
    )
    prompt_format: Format = Field(
        "chat", description="how tasks are sent: chat, with the model's chat template, or text"
    )
    prompt_seed: int = Field(0, description="of the tasks' prompts")

    @property
    def compares_text(self) -> bool:
        """Return whether the texts of answers are compared."""
        return True

    @property
    def chosen_tasks(self) -> list[Task]:
        return choose_tasks(self.tasks)

    def check(self) -> None:
        """Refuse what can't be used.

        Raises:
            ValueError: a task or a file of prompts that can't be used, or not exactly one of tasks and prompts.
        """
        if bool(self.tasks) == (self.prompts is not None):
            raise ValueError("either --tasks or --prompts is needed, and not both")
        if len(set(self.lengths)) < len(self.lengths):
            given = ",".join(map(str, self.lengths))
            raise ValueError(f"lengths={given!r} is refused: a length is given twice. Allowed: each length once")
        _ = self.chosen_tasks, self.prompts and read_own_prompts(self.prompts)

    def prompts_setup(self) -> dict[str, Any]:
        """Return the options that decide the prompts, as JSON."""
        if self.prompts is not None:
            content = hashlib.sha256(self.prompts.read_bytes()).hexdigest()
            return {"prompts_sha256": content, "max_tokens": self.max_tokens}
        return {
            "tasks": [task.name for task in self.chosen_tasks],
            "lengths": list(self.lengths),
            "prompts_per_cell": self.prompts_per_cell,
            "prompt_format": self.prompt_format,
            "prompt_seed": self.prompt_seed,
        }

    def command(self, target: Sequence[str]) -> str:
        """Return the command that measures the same.

        Args:
            target: arguments that name the server or the model to serve.
        """
        parts = ["starling", self.subcommand, *without_secrets(target)]
        for field, value in sorted(self, key=lambda item: item[0] != "plans"):
            option = f"--{field.replace('_', '-')}"
            without_effect = OF_TASKS if self.prompts else OF_OWN_PROMPTS
            if value is None or field in without_effect or (field in OF_OWN_PROMPTS and not self.compares_text):
                continue
            if field == "plans":
                parts += [argument for plan in value for argument in ("--plan", plan)]
            else:
                parts += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return shlex.join([*parts, "--out", "DIR"])


def folder_setup(model: str, server_options: Sequence[str] | None) -> dict[str, Any]:
    """Return what all answers in a folder have in common, as JSON. An answer's key says the rest: its prompt and plan.

    Args:
        server_options: options of the server that was started for the command, or None for a running one, whose options
            are not known.
    """
    setup: dict[str, Any] = {"version": SETUP_VERSION, "model": model}
    return setup if server_options is None else setup | {SERVER_OPTIONS: without_secrets(server_options)}


class EvalOptions(PromptOptions):
    """The options of `starling eval` that decide what is measured."""

    subcommand = "eval"
    plans: tuple[str, ...] = Field((), description="plans beside dense")
    logprobs: int = Field(0, ge=0, description="also compare distributions at N tokens of the answer")

    @property
    def all_plans(self) -> list[Plan]:
        """Return dense, and then the others."""
        return with_dense(map(parse_plan, self.plans))

    def check(self) -> None:
        """Refuse what can't be used (raises ValueError), a plan too."""
        super().check()
        _ = self.all_plans

    def setup(self, model: str, server_options: Sequence[str] | None) -> dict[str, Any]:
        """Return what is measured, as JSON.

        Args:
            server_options: the same as for ``folder_setup``.
        """
        setup = folder_setup(model, server_options) | {
            "plans": {plan.name: plan.options for plan in self.all_plans},
            "logprobs": self.logprobs,
        }
        return setup | self.prompts_setup()


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `...` for the values of options that are secret by their names, such as --hf-token.

    vLLM's --api-key takes several values, so all are hidden up to the next option.
    """
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        words = name.replace("_", "-").split("-")  # --max-num-batched-tokens is no secret
        if name.startswith("--"):
            secret = not SECRET_WORDS.isdisjoint(words)
            shown.append(f"{name}=..." if secret and equals else argument)
            hide = secret and not equals
        else:
            shown.append("..." if hide else argument)
    return shown


def parse_options(model: type[Options], values: dict[str, Any]) -> Options:
    """Parse options from a command line.

    Args:
        model: the command's options.

    Raises:
        ValueError: an option is wrong; the message has the option, its value and what is allowed.
    """
    try:
        options = model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}={first['input']!r} is refused: {first['msg']}") from None
    options.check()
    return options
