"""The folder of a measurement: its setup, and a line for each answer, so that a run that was ended can go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

SETUP, RESULTS = "setup.json", "results.jsonl"
SERVER_OPTIONS = "server_options"


class TokenScore(BaseModel):
    """The distribution at one position of the reference answer, or of dense's answer where there is no reference.

    Attributes:
        logprob: log-probability of the answer's token, in nats.
        top: token id -> log-probability, of the most probable tokens and of the answer's.
    """

    model_config = ConfigDict(frozen=True)

    logprob: float
    top: dict[int, float]


class Answer(BaseModel):
    """The output of one prompt under one plan.

    Attributes:
        key: a hash of everything that the answer depends on.
        prompt, plan: their names.
        server_plan: the server's ``x-starling-plan``, or None without Starling.
        scores: distributions at the answer's tokens, with --logprobs.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    prompt: str
    plan: str
    text: str
    finish_reason: str | None
    token_ids: list[int] | None
    server_plan: dict[str, Any] | None
    scores: list[TokenScore] = []


def answer_key(*content: Any) -> str:
    """Return a key for values that JSON holds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes out of it until the block ends.

    Raises:
        ValueError: the folder can't be made or written, or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / RESULTS).open("ab")
    except OSError as error:
        raise ValueError(f"out={str(folder)!r} is refused: {error}. Allowed: a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out={str(folder)!r} is refused: another process uses it") from None
        yield


class Store:
    """A folder with the answers of one setup, as a context manager. ``locked`` keeps other processes out of it.

    Raises:
        ValueError: the folder has another setup, or a damaged line.
    """

    def __init__(self, folder: Path, setup: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / RESULTS).open("a+b")
        try:
            check_setup(folder, setup)
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # the process ended while it wrote this line
                self._file.truncate(sum(map(len, lines[:-1])))
                lines.pop()
            self.answers = {answer.key: answer for answer in read_answers(folder / RESULTS, lines)}
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Append an answer; it is in the file when the call returns."""
        self._file.write(answer.model_dump_json().encode() + b"\n")
        self._file.flush()
        self.answers[answer.key] = answer


def check_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Write the setup into an empty folder; refuse (ValueError) a folder with another one.

    What one of the two does not know, the options of a server that ran already, makes no difference.
    """
    before = stored_setup(folder)
    if before is None:
        (folder / SETUP).write_text(json.dumps(setup, indent=2) + "\n", encoding="utf-8")
        return
    names = before.keys() | setup.keys()
    if SERVER_OPTIONS not in before or SERVER_OPTIONS not in setup:
        names -= {SERVER_OPTIONS}
    changed = [
        f"{name} was {before.get(name)!r} and is {setup.get(name)!r}"
        for name in sorted(names)
        if before.get(name) != setup.get(name)
    ]
    if changed:
        raise ValueError(
            f"out={str(folder)!r} is refused: it has results of another setup ({'; '.join(changed)}). "
            "Allowed: the same model and server as before, or another folder."
        )


def stored_setup(folder: Path) -> dict[str, Any] | None:
    """Return the setup of a folder, or None if there is none (raises ValueError for a damaged one)."""
    path = folder / SETUP
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: use another --out") from None


def read_answers(path: Path, lines: Sequence[bytes]) -> list[Answer]:
    """Return the answers of a file's lines (raises ValueError for a line that holds none)."""
    answers = []
    for number, line in enumerate(lines, start=1):
        try:
            answers.append(Answer.model_validate_json(line))
        except ValidationError:
            raise ValueError(f"{path}, line {number} is damaged: delete the line to repeat its request") from None
    return answers
