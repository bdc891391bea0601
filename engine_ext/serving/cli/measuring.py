"""What `starling eval` and `starling tune` have in common: the server, the prompts, interruption and exit codes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from engine_ext.evaluation.client import Client, ServerError
from engine_ext.evaluation.options import PromptOptions, folder_setup
from engine_ext.evaluation.prompts import Prompt, own_prompt, read_own_prompts, task_prompts
from engine_ext.evaluation.server import StartError, served
from engine_ext.evaluation.store import check_setup, stored_setup
from engine_ext.evaluation.tasks import GROUPS, TASKS

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
SPEED_SECONDS = 3600  # a long prompt takes minutes, and the time left is estimated from those of the last hour
KEY_ENV, SERVE_KEY_ENV = "OPENAI_API_KEY", "VLLM_API_KEY"
LOG_FILE = "server.log"

Measurement = Callable[[Sequence[str], Console], Awaitable[int]]
"""(the arguments that name the server, console) -> exit code. The server runs, at ``args.base_url``."""


def comma(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(","))


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, or a server that runs."""
    add = parser.add_argument
    add("serve", nargs="?", metavar="MODEL", help="start `starling serve MODEL` for the measurement, and stop it")
    add("--base-url", metavar="URL", help="a server that runs, such as http://localhost:8000")
    add("--model", metavar="NAME", help="the model's name on the server; needed where it has several")
    add("--api-key", metavar="KEY", help=f"of the server; default: the environment variable {KEY_ENV}")


def add_prompt_options(parser: argparse.ArgumentParser, fields: dict[str, FieldInfo]) -> None:
    """Which prompts are measured, how, and where the results go.

    Args:
        fields: of the command's options, for their defaults.
    """
    add = parser.add_argument
    add("--tasks", type=comma, default=(), metavar="A,B", help=f"of {', '.join((*GROUPS, *TASKS))}; niah: all niah_...")
    add(
        "--lengths",
        type=comma,
        metavar="N,M",
        default=fields["lengths"].default,
        help="tokens of prompt and answer: 4096",
    )
    add(
        "--prompts-per-cell",
        type=int,
        metavar="N",
        default=fields["prompts_per_cell"].default,
        help="of each task and length: 20",
    )
    add("--prompts", type=Path, metavar="FILE", help="your own prompts as JSONL, in place of tasks")
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        default=fields["max_tokens"].default,
        help="of answers to your own prompts: 128",
    )
    formats = ("chat", "text")
    add(
        "--prompt-format",
        choices=formats,
        default=fields["prompt_format"].default,
        help="how tasks are sent: chat (default), with the chat template, or text",
    )
    add(
        "--prompt-seed",
        type=int,
        metavar="N",
        default=fields["prompt_seed"].default,
        help="of the tasks' prompts: 0",
    )
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
    console = Console(highlight=False)
    resume = f"The answers so far are in {args.out}: the same command goes on from there."
    try:
        check_arguments(args, serve_options)
        measure = prepare(args)
        check_folder(args.out)
        with contextlib.ExitStack() as stack:
            stack.enter_context(signals_as_interrupt())
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
    except (ServerError, StartError) as error:
        print(f"{command}: error: {error}\n{resume}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{command}: interrupted\n{resume}", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the measurement as Ctrl-C does, so that its server is stopped."""
    before = {
        number: signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
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
        raise ValueError("either MODEL, which is served for the measurement, or --base-url is needed, and not both")
    if args.base_url is not None and (not args.base_url.startswith(("http://", "https://")) or "@" in args.base_url):
        raise ValueError(f"base_url={args.base_url!r} is refused. Allowed: http://HOST or https://HOST, and --api-key")
    if args.serve is not None and args.api_key:
        raise ValueError(f"--api-key goes with --base-url. The server of MODEL takes that of {SERVE_KEY_ENV}")
    for name in ("concurrency", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)} is refused: it must be more than 0")


def check_folder(folder: Path) -> None:
    """Refuse (ValueError) a folder with answers in another format, before a server starts and says its model."""
    before = stored_setup(folder)
    if before is not None:
        check_setup(folder, folder_setup(before.get("model", "")))


def connect(args: argparse.Namespace) -> Client:
    """A client of the server, as an asynchronous context manager."""
    key = args.api_key or os.environ.get(KEY_ENV if args.serve is None else SERVE_KEY_ENV)
    return Client(args.base_url, args.model, key, args.timeout)


def progress_bars(console: Console) -> Progress:
    """Bars with counts and the time left."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("left")]
    return Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)


async def make_prompts(options: PromptOptions, client: Client, progress: Progress) -> list[Prompt]:
    """The user's prompts, or those of all tasks and lengths.

    Raises:
        ServerError: a request failed.
        ValueError: a prompt can't be made, or is too long for the server.
    """
    prompts: list[Prompt] = []
    if options.prompts is not None:
        lines = read_own_prompts(options.prompts)
        bar = progress.add_task("prompts", total=len(lines))
        for line, own in lines:
            prompts.append(await own_prompt(own, line, options.max_tokens, client))
            progress.advance(bar)
    else:
        cells = [(task, length) for length in options.lengths for task in options.chosen_tasks]
        bar = progress.add_task("prompts", total=len(cells))
        settings: dict[str, Any] = {"seed": options.prompt_seed, "prompt_format": options.prompt_format}
        for task, length in cells:
            prompts += await task_prompts(task, length, options.prompts_per_cell, tokenizer=client, **settings)
            progress.advance(bar)
    refuse_long(prompts, (await client.facts()).max_model_len)
    return prompts


def refuse_long(prompts: Sequence[Prompt], max_model_len: int) -> None:
    """Refuse (ValueError) prompts that the server can't take."""
    for prompt in prompts:
        needed = len(prompt.token_ids) + prompt.max_tokens
        if needed > max_model_len:
            raise ValueError(
                f"the prompt {prompt.name} needs {needed} tokens with its answer, and the server's max_model_len is "
                f"{max_model_len}"
            )
