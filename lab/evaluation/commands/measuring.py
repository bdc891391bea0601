"""What `starling eval` and `starling tune` have in common: the server, the prompts, interruption and exit codes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from starling.lab.evaluation.client import Client, ServerError, ServerFacts, naming, refuse_key
from starling.lab.evaluation.prompt_options import PromptOptions, folder_setup
from starling.lab.evaluation.prompts import Prompt, Tokenizer, distinct, own_prompt, read_own_prompts, task_prompts
from starling.lab.evaluation.server_process import StartError, served
from starling.lab.evaluation.store import Store, check_setup, locked, stored_setup
from starling.lab.evaluation.tasks import GROUPS, TASKS
from starling.lab.evaluation.tokenizer import LocalTokenizer

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
SPEED_SECONDS = 3600  # a long prompt takes minutes, and the time left is estimated from those of the last hour
KEY_ENV, SERVE_KEY_ENV = "OPENAI_API_KEY", "VLLM_API_KEY"
LOG_FILE = "server.log"
WIDE = 250  # columns of a log, so that no row of a table is broken
LINE_SECONDS = 60.0  # between two lines of progress in a log

Measurement = Callable[[Sequence[str], Console], Awaitable[int]]
"""(the arguments that name the server, console) -> exit code. The server runs, at ``args.base_url``."""


def comma(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(","))


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, or a server that runs."""
    add = parser.add_argument
    add(
        "serve",
        nargs="?",
        metavar="MODEL",
        help="start `starling serve MODEL` for this command, and stop it",
    )
    add("--base-url", metavar="URL", help="a server that runs, such as http://localhost:8000")
    add("--model", metavar="NAME", help="the model's name on the server; needed where it has several")
    add("--api-key", metavar="KEY", help=f"of the server; default: the environment variable {KEY_ENV}")
    add("--tokenizer", metavar="FOLDER", help="the model's tokenizer, for a server without vLLM's /tokenize")


def add_prompt_options(parser: argparse.ArgumentParser, fields: dict[str, FieldInfo]) -> None:
    """Which prompts are measured, how, and where the results go.

    Args:
        fields: of the command's options, for their defaults.
    """
    add, format_help = parser.add_argument, "how tasks are sent: chat (default), with the chat template, or text"
    add("--tasks", type=comma, metavar="A,B", help=f"of {', '.join((*GROUPS, *TASKS))}; niah: all niah_...")
    add("--lengths", type=comma, metavar="N,M", help="tokens of prompt and answer: 4096")
    add("--prompts-per-cell", type=int, metavar="N", help="of each task and length: 20")
    add("--prompts", type=Path, metavar="FILE", help="your own prompts as JSONL, in place of tasks")
    add("--max-tokens", type=int, metavar="N", help="of answers to your own prompts: 128")
    add("--prompt-format", choices=("chat", "text"), help=format_help)
    add("--prompt-seed", type=int, metavar="N", help="of the tasks' prompts: 0")
    parser.set_defaults(**{name: fields[name].default for name in PromptOptions.model_fields})
    add("--concurrency", type=int, metavar="N", default=1, help="prompts at the same time: 1")
    add("--timeout", type=float, metavar="SECONDS", default=600, help="that an answer may take: 600")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results; a run that was ended goes on")


def run_measurement(
    command: str,
    args: argparse.Namespace,
    serve_options: Sequence[str],
    prepare: Callable[[argparse.Namespace], Measurement],
) -> int:
    """Check the arguments, start a server for MODEL, and measure.

    Args:
        command: such as ``starling eval``, for messages.
        serve_options: the arguments that the command does not know.
        prepare: what the arguments ask for; it refuses (ValueError) what can be refused before a server starts.

    Returns:
        The exit code of the measurement; 1 where a request or the server failed, 2 for unusable arguments, or 130.
    """
    console = make_console()
    resume = f"The answers so far are in {args.out}: the same command goes on from there."
    try:
        check_arguments(args, serve_options)
        if args.serve is not None and args.tokenizer is not None:
            serve_options = [*serve_options, "--tokenizer", args.tokenizer]  # an option of vLLM's too
            args.tokenizer = None  # prompts are made with the server's
        measure = prepare(args)
        with contextlib.ExitStack() as stack:
            stack.enter_context(signals_as_interrupt())
            stack.enter_context(locked(args.out))
            check_folder(args.out)
            if args.serve is not None:
                log = args.out / LOG_FILE
                with console.status(f"starting starling serve {escape(args.serve)} (log: {escape(str(log))})"):
                    args.base_url = stack.enter_context(served(args.serve, serve_options, log))
            target = [args.serve, *serve_options] if args.serve else ["--base-url", args.base_url]

            async def measured() -> int:
                return await measure(target, console)

            return asyncio.run(measured())
    except ValueError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return UNUSABLE
    except (ServerError, StartError, OSError) as error:
        print(f"{command}: error: {error}\n{resume}", file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{command}: interrupted\n{resume}", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the measurement as Ctrl-C does, so that its server is stopped.

    Under nohup, SIGHUP is ignored, and stays so. What SIGINT does here makes no difference: a background job of a
    script ignores it.
    """

    def interrupt(*_: object) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise KeyboardInterrupt from None
        loop.call_soon_threadsafe(cancel_tasks)  # an exception here would be one of the task that runs just now

    def cancel_tasks() -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_arguments(args: argparse.Namespace, serve_options: Sequence[str]) -> None:
    """Refuse (ValueError) arguments that contradict one another."""
    if args.base_url is not None and serve_options:
        raise ValueError(f"unknown options: {' '.join(serve_options)}. Options of `starling serve` go with MODEL")
    if (args.serve is None) == (args.base_url is None):
        raise ValueError("either MODEL, which is then served, or --base-url is needed, and not both")
    if args.base_url is not None:
        check_base_url(args.base_url)
    if args.serve is not None and args.api_key:
        raise ValueError(f"--api-key goes with --base-url. The server of MODEL takes that of {SERVE_KEY_ENV}")
    for name in ("concurrency", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)} is refused: it must be more than 0")
    _ = chosen_key(args)


def check_base_url(url: str) -> None:
    """Refuse (ValueError) what is no URL of a server. A password in it is not shown."""
    reason = "" if url.startswith(("http://", "https://")) else "it is no URL of HTTP"
    found = sorted(set(url) & set("@?#"))
    if found:
        reason = f"it has {' and '.join(found)}"
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        reason = reason or str(error)
    if reason:
        shown = re.sub("//.*@", "//...@", url)
        raise ValueError(
            f"base_url={shown!r} is refused: {reason}. Allowed: http://HOST or https://HOST, with a port and a path "
            "(a key is --api-key)"
        )


def chosen_key(args: argparse.Namespace) -> str | None:
    """The key of the server (raises ValueError for one that can't be sent)."""
    variable = KEY_ENV if args.serve is None else SERVE_KEY_ENV
    key = args.api_key or os.environ.get(variable)
    refuse_key(key or "", "--api-key" if args.api_key else variable)
    return key


def check_folder(folder: Path) -> None:
    """Refuse (ValueError) a folder with answers in another format, before a server starts and says its model."""
    before = stored_setup(folder)
    if before is not None:
        check_setup(folder, folder_setup(before.get("model", "")))


def connect(args: argparse.Namespace) -> Client:
    """A client of the server, as an asynchronous context manager (raises ValueError for a folder without tokenizer)."""
    tokenizer = None if args.tokenizer is None else LocalTokenizer(Path(args.tokenizer))
    return Client(args.base_url, args.model, chosen_key(args), args.timeout, tokenizer)


def repeated(args: argparse.Namespace, model: str) -> list[str]:
    """The arguments of a report's command that say how the server was asked."""
    arguments = ["--model", model, "--concurrency", str(args.concurrency), "--timeout", f"{args.timeout:g}"]
    return arguments if args.tokenizer is None else [*arguments, "--tokenizer", args.tokenizer]


@dataclass(frozen=True)
class Session:
    """A server, the folder of the answers, and the prompts, while a command measures.

    Attributes:
        args: of the command line.
        prompts: each one once.
        num_equal: prompts that were left out, since others are equal.
    """

    args: argparse.Namespace
    client: Client
    facts: ServerFacts
    store: Store
    progress: Progress
    prompts: list[Prompt]
    num_equal: int

    def described(self, command: str) -> dict[str, Any]:
        """What the reports of both commands say of the measurement; ``command`` repeats it."""
        server = {"base_url": self.client.base_url, **vars(self.facts)}
        return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "server": server}


@contextlib.asynccontextmanager
async def open_session(
    args: argparse.Namespace, options: PromptOptions, console: Console, star_plans: Sequence[str], num_logprobs: int
) -> AsyncIterator[Session]:
    """Connect to the server, open the folder, and make the prompts.

    Args:
        star_plans: names of the plans that need Starling.
        num_logprobs: tokens of the answer that are sent behind a prompt.

    Raises:
        ServerError: a request failed.
        ValueError: the folder has answers of another model, or a prompt can't be made or sent.
    """
    async with connect(args) as client:
        facts = await checked_facts(client, options, star_plans)
        with Store(args.out, folder_setup(facts.model)) as store, progress_bars(console) as progress:
            made = await make_prompts(options, client.tokenizer, progress)
            if not options.compares_text:
                made = [replace(prompt, max_tokens=0) for prompt in made]
            if facts.max_model_len is not None:
                refuse_long(made, facts.max_model_len, num_logprobs)
            prompts = distinct(made)
            yield Session(args, client, facts, store, progress, prompts, len(made) - len(prompts))


async def checked_facts(client: Client, options: PromptOptions, star_plans: Sequence[str]) -> ServerFacts:
    """What the server says about itself.

    Args:
        star_plans: names of the plans that need Starling.

    Raises:
        ServerError: a request failed, or Starling is needed and not activated.
        ValueError: a length is above the server's.
    """
    facts = await client.facts()
    for plan in star_plans[:1]:
        await client.refuse_without_starling(plan)
    longest = max(options.lengths)
    if options.prompts is None and facts.max_model_len is not None and longest > facts.max_model_len:
        raise ValueError(f"lengths={longest} is refused: the server's max_model_len is {facts.max_model_len}")
    return facts


def make_console() -> Console:
    """Standard output. A file or a pipe is wide: rich would take 80 columns, in which tables can't be read."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    return console


class ProgressLines(Progress):
    """A line of progress now and then in place of bars, for a log."""

    printed = 0.0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            task = self.tasks[task_id]
            total = "" if task.total is None else f" of {task.total:g}"
            left = "" if not task.time_remaining else f", {timedelta(seconds=task.time_remaining)} left"
            self.console.print(f"{task.description}: {task.completed:g}{total}{left}")


def progress_bars(console: Console) -> Progress:
    """Bars with counts and the time left, or lines where standard output is no terminal."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("left")]
    if not console.is_terminal:
        return ProgressLines(console=console, disable=True)
    return Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)


async def make_prompts(options: PromptOptions, tokenizer: Tokenizer, progress: Progress) -> list[Prompt]:
    """The user's prompts, or those of all tasks and lengths; equal ones too.

    Raises:
        ServerError: a request to a server that is the tokenizer failed.
        ValueError: a prompt can't be made.
    """
    prompts: list[Prompt] = []
    if options.prompts is not None:
        lines = read_own_prompts(options.prompts)
        bar = progress.add_task("prompts", total=len(lines))
        for line, own in lines:
            with naming(f"line {line}"):
                prompts.append(await own_prompt(own, line, options.max_tokens, tokenizer))
            progress.advance(bar)
    else:
        cells = [(task, length) for length in options.lengths for task in options.chosen_tasks]
        bar = progress.add_task("prompts", total=len(cells))
        settings: dict[str, Any] = {"seed": options.prompt_seed, "prompt_format": options.prompt_format}
        settings["tokenizer"] = tokenizer
        for task, length in cells:
            prompts += await task_prompts(task, length, options.prompts_per_cell, **settings)
            progress.advance(bar)
    progress.update(bar, visible=False)  # one bar at a time
    return prompts


def refuse_long(prompts: Sequence[Prompt], max_model_len: int, num_logprobs: int) -> None:
    """Refuse (ValueError) prompts that the server can't take with their answers, or with the expected ones."""
    for prompt in prompts:
        followed = len(prompt.answer_ids[:num_logprobs]) or (0 if prompt.max_tokens else num_logprobs)
        needed = len(prompt.token_ids) + max(prompt.max_tokens, followed)
        if needed > max_model_len:
            raise ValueError(
                f"the prompt {prompt.name} needs {needed} tokens with its answer, and the server's max_model_len is "
                f"{max_model_len}"
            )
