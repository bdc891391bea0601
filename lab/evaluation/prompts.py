"""The prompts as tokens: those of the tasks, cut to a length, and the user's own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from starling.lab.evaluation.tasks import Example, Match, Task

Format = Literal["chat", "text"]
NEAR = 0.98  # of the budget, where the search for a task's size may end
MAX_MEASUREMENTS = 12
END_CHARACTERS = 600
LINES = 'JSONL, with one object in each line: {"prompt": "..."} or {"messages": [...]}, and "answer"'
OWN = "prompts"
OWN_WITHOUT_ANSWER = "prompts without answers"
NO_TEMPLATE = (
    "Without a chat template: --prompt-format text for tasks, and for your own prompts `prompt` in place of `messages`"
)


class TooLong(ValueError):
    """The shortest prompt of a task has more tokens than there is room for."""


class Tokenizer(Protocol):
    """Protocol that counts and makes tokens: the server (``client.Client``), or a ``tokenizer.LocalTokenizer``."""

    async def tokenize(self, text: str) -> list[int]: ...

    async def tokenize_prompt(self, text: str) -> list[int]: ...

    async def tokenize_chat(self, messages: list[Any]) -> list[int]: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt to send, and the expected answer.

    Attributes:
        name: name that is unique within an evaluation.
        task: the task's name, or OWN or OWN_WITHOUT_ANSWER.
        length: number of tokens that prompt and answer may have; None for the user's own prompts.
        token_ids: tokens of the prompt.
        end: the last characters of the prompt, for reports.
        references: strings that a right answer contains; if empty, the answer is compared with dense's.
        match: rule by which they are counted.
        answer_ids: the tokens of a right answer; empty where there are no references.
        max_tokens: maximum tokens of the answer; 0 if its text is not needed, but only the log-probabilities of an
            answer.
        depth: place where the fact begins that the answer needs (``Example.depth``); None for the user's own prompts.
    """

    name: str
    task: str
    length: int | None
    token_ids: tuple[int, ...]
    end: str
    references: tuple[str, ...]
    match: Match
    answer_ids: tuple[int, ...]
    max_tokens: int
    depth: float | None = None


class OwnPrompt(BaseModel):
    """A line of the user's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str | None = Field(None, min_length=1)
    messages: list[Any] | None = Field(None, min_length=1)
    answer: str | list[str] | None = None
    match: Match = "all"

    @model_validator(mode="after")
    def check(self) -> OwnPrompt:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a line has either prompt or messages")
        if self.answer == [] or any(not text.strip() for text in self.references):
            raise ValueError("answer is empty: leave it out where there is none")
        for message in self.messages or ():
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and part.get("type") != "text":
                    raise ValueError(
                        f"a part of the type {part.get('type')!r} is refused: prompts are sent as tokens of "
                        "text. Allowed: 'text'"
                    )
        return self

    @property
    def references(self) -> tuple[str, ...]:
        if self.answer is None:
            return ()
        return (self.answer,) if isinstance(self.answer, str) else tuple(self.answer)


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts, each text once: an equal prompt says nothing new."""
    found: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.token_ids, prompt)
    return list(found.values())


async def fit(
    make: Callable[[int], Example], measure: Callable[[Example], Awaitable[int]], budget: int, least: int, guess: int
) -> tuple[int, int]:
    """Find the size whose example has at most ``budget`` tokens, and comes near it.

    Args:
        make: size -> example; a larger size has more tokens.
        measure: function that returns the tokens of an example.
        least: the smallest size.
        guess: size at which the search begins.

    Returns:
        (size, its tokens).

    Raises:
        TooLong: the smallest size has too many tokens.
    """
    low, low_tokens = least, await measure(make(least))
    if low_tokens > budget:
        raise TooLong(f"its shortest prompt has {low_tokens} tokens, and {budget} are left for it")
    high: int | None = None
    size = max(guess, least + 1)
    for _ in range(MAX_MEASUREMENTS):
        tokens = await measure(make(size))
        slope = max((tokens - low_tokens) / (size - low), 0.01) if size != low else 1.0
        if tokens > budget:
            high = size
        else:
            low, low_tokens = size, tokens
            if tokens >= NEAR * budget:
                break
        step = int((budget - low_tokens) / slope)
        size = low + max(1, step)
        if high is not None:
            if high - low <= 1:
                break
            size = min(size, high - 1)
    return low, low_tokens


async def task_prompts(
    task: Task, length: int, count: int, *, seed: int, prompt_format: Format, tokenizer: Tokenizer
) -> list[Prompt]:
    """Return ``count`` prompts of a task that fit, with their answers, into ``length`` tokens.

    They depend on the task, the length, the index, the seed and the tokenizer, and on nothing else.

    Raises:
        ValueError: the task has no prompt so short, or the tokenizer can't make it.
    """
    budget, prompts, guess = length - task.max_tokens, [], task.least + 8
    for index in range(count):
        name = f"{task.name}/{length}/{index}"

        def make(size: int, name: str = name) -> Example:
            return task.make(Random(f"{seed}/{name}"), size)

        async def measure(example: Example) -> int:
            return len(await example_tokens(example, prompt_format, tokenizer))

        try:
            size, _ = await fit(make, measure, budget, task.least, guess)
        except TooLong as error:
            raise ValueError(f"lengths={length} is too short for the task {task.name}: {error}") from None
        guess = size if index == 0 else guess
        example = make(size)
        prompts.append(
            Prompt(
                name=name,
                task=task.name,
                length=length,
                token_ids=tuple(await example_tokens(example, prompt_format, tokenizer)),
                end=f"{example.text}\n\n{example.answer_prefix}"[-END_CHARACTERS:],
                references=example.references,
                match="all",
                answer_ids=tuple(await tokenizer.tokenize(example.answer)),
                max_tokens=task.max_tokens,
                depth=example.depth,
            )
        )
    return prompts


async def example_tokens(example: Example, prompt_format: Format, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of an example's prompt, up to where the model goes on."""
    if prompt_format == "text":
        return await tokenizer.tokenize_prompt(f"{example.text}\n\n{example.answer_prefix}")
    chat = await tokenizer.tokenize_chat([{"role": "user", "content": example.text}])
    return chat + await tokenizer.tokenize(example.answer_prefix)


def read_json_lines(path: Path, option: str, allowed: str) -> list[tuple[int, Any]]:
    """Return (line number, value) of each line of a JSONL file that is not empty.

    A line ends at a line feed alone: JSON may hold the other characters that Unicode ends lines with.

    Args:
        option: option that names the file.
        allowed: description of allowed lines, for messages.

    Raises:
        ValueError: the file can't be read, has no line, or a line is not JSON; with the line's number.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file, and it is read several times. Allowed: a file")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={str(path)!r} can't be read: {error}") from None
    if text.lstrip().startswith("["):
        raise ValueError(f"{option}={str(path)!r} is refused: it is one JSON array. Allowed: {allowed}")
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                reason = f"it is not JSON that can be read: {error}"
                raise ValueError(f"{path}, line {number}: {reason}. Allowed: {allowed}") from None
    if not values:
        raise ValueError(f"{option}={str(path)!r} is refused: the file has no {option.removesuffix('s')}")
    return values


def read_own_prompts(path: Path) -> list[tuple[int, OwnPrompt]]:
    """Return (line number, prompt) of each line of the user's file (raises ValueError: a line is not a prompt)."""
    lines = read_json_lines(path, "prompts", LINES)
    return [(number, as_own_prompt(value, f"{path}, line {number}")) for number, value in lines]


def as_own_prompt(value: Any, place: str) -> OwnPrompt:
    """Return the prompt of a line; ``place`` names it in the message of a ValueError for a line that is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: it is no object. Allowed: {LINES}")
    try:
        return OwnPrompt.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        allowed = f". Allowed: {', '.join(OwnPrompt.model_fields)}" if unknown else ""
        raise ValueError(f"{place}: {field + ': ' if field else ''}{first['msg']}{allowed}") from None


async def own_prompt(own: OwnPrompt, line: int, max_tokens: int, tokenizer: Tokenizer) -> Prompt:
    """Return one of the user's prompts as tokens: a text as it is, messages with the model's chat template."""
    if own.prompt is not None:
        token_ids, end = await tokenizer.tokenize_prompt(own.prompt), own.prompt
    else:
        token_ids, end = await tokenizer.tokenize_chat(own.messages or []), json.dumps(own.messages, ensure_ascii=False)
    answer = ", ".join(own.references) if own.match == "all" else next(iter(own.references), "")
    return Prompt(
        name=f"line {line}",
        task=OWN if own.references else OWN_WITHOUT_ANSWER,
        length=None,
        token_ids=tuple(token_ids),
        end=end[-END_CHARACTERS:],
        references=own.references,
        match=own.match,
        answer_ids=tuple(await tokenizer.tokenize(answer)) if answer else (),
        max_tokens=max_tokens,
    )
