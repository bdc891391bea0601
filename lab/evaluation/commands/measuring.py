"""Common parts of `starling eval` and `starling advise`: the server, the prompts, interruption and exit codes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from starling.lab.command_line import make_console, progress_bars, run_command
from starling.lab.evaluation.answers import naming
from starling.lab.evaluation.client import Client, ServerFacts, refuse_key
from starling.lab.evaluation.prompt_options import PromptOptions, folder_setup, without_secrets
from starling.lab.evaluation.prompts import Prompt, Tokenizer, distinct, own_prompt, read_own_prompts, task_prompts
from starling.lab.evaluation.server_process import served
from starling.lab.evaluation.store import Store, check_setup, locked, stored_setup
from starling.lab.evaluation.tokenizer import LocalTokenizer

KEY_ENV, SERVE_KEY_ENV = "OPENAI_API_KEY", "VLLM_API_KEY"
LOG_FILE = "server.log"
OUT_HELP = "folder of the results; a run that was ended goes on"

Measurement = Callable[[Sequence[str], Console], Awaitable[int]]
"""(the arguments that name the server, console) -> exit code. The server runs, at ``args.base_url``."""


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the target: MODEL, or a server that runs."""
    add, model_help = parser.add_argument, "start `starling serve MODEL` for this command, and stop it"
    add("serve", nargs="?", metavar="MODEL", help=model_help)
    add("--base-url", metavar="URL", help="a server that runs, such as http://localhost:8000, in place of MODEL")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server: MODEL, or a server that runs, and how it is asked."""
    add_target_options(parser)
    add = parser.add_argument
    add("--model", metavar="NAME", help="the model's name on the server; needed where it has several")
    add("--api-key", metavar="KEY", help=f"of the server; default: the environment variable {KEY_ENV}")
    add("--tokenizer", metavar="FOLDER", help="the model's tokenizer, for a server without vLLM's /tokenize")
    add("--concurrency", type=int, metavar="N", default=1, help="prompts at the same time: 1")
    add("--timeout", type=float, metavar="SECONDS", default=600, help="that an answer may take: 600")


def run_measurement(
    command: str,
    args: argparse.Namespace,
    serve_options: Sequence[str],
    prepare: Callable[[argparse.Namespace], Measurement],
) -> int:
    """Check the arguments, start a server for MODEL, and measure.

    Args:
        command: name of the command for messages, such as ``starling eval``.
        serve_options: the arguments that the command does not know.
        prepare: function that returns what the arguments ask for; it refuses (ValueError) what can be refused before a
            server starts.

    Returns:
        The exit code of the measurement, or those of ``run_command``.
    """
    console = make_console()

    def run() -> int:
        options = list(serve_options)
        check_arguments(args, options)
        if args.serve is not None and args.tokenizer is not None:
            options += ["--tokenizer", args.tokenizer]  # an option of vLLM's too
            args.tokenizer = None  # prompts are made with the server's
        args.server_options = options if args.serve is not None else None
        measure = prepare(args)
        with locked(args.out), contextlib.ExitStack() as stack:
            check_folder(args.out, args.server_options)
            if args.serve is not None:
                log = args.out / LOG_FILE
                with console.status(f"starting starling serve {escape(args.serve)} (log: {escape(str(log))})"):
                    args.base_url = stack.enter_context(served(args.serve, options, log))
            target = [args.serve, *options] if args.serve else ["--base-url", args.base_url]

            async def measured() -> int:
                return await measure(target, console)

            return asyncio.run(measured())

    resume = f"The answers so far are in {args.out}: the same command goes on from there."
    return run_command(command, run, lambda: resume)


def check_arguments(args: argparse.Namespace, serve_options: Sequence[str]) -> None:
    """Refuse (ValueError) arguments that contradict one another."""
    if args.base_url is not None and serve_options:
        raise ValueError(
            f"unknown options: {' '.join(without_secrets(serve_options))}. Options of `starling serve` go with MODEL"
        )
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
    """Return the key of the server (raises ValueError for one that can't be sent)."""
    variable = KEY_ENV if args.serve is None else SERVE_KEY_ENV
    key = args.api_key or os.environ.get(variable)
    refuse_key(key or "", "--api-key" if args.api_key else variable)
    return key


def check_folder(folder: Path, server_options: Sequence[str] | None) -> None:
    """Refuse (ValueError) a folder with answers of other options, before a server starts and says its model."""
    before = stored_setup(folder)
    if before is not None:
        check_setup(folder, folder_setup(before.get("model", ""), server_options))


def connect(args: argparse.Namespace) -> Client:
    """Return a client of the server, as an asynchronous context manager.

    Raises:
        ValueError: a folder without tokenizer.
    """
    tokenizer = None if args.tokenizer is None else LocalTokenizer(Path(args.tokenizer))
    return Client(args.base_url, args.model, chosen_key(args), args.timeout, tokenizer)


def repeated(args: argparse.Namespace, model: str) -> list[str]:
    """Return the arguments of a report's command that say how the server was asked."""
    arguments = ["--model", model, "--concurrency", str(args.concurrency), "--timeout", f"{args.timeout:g}"]
    return arguments if args.tokenizer is None else [*arguments, "--tokenizer", args.tokenizer]


@dataclass(frozen=True)
class Session:
    """A server, the folder of the answers, and the prompts, while a command measures.

    Attributes:
        args: arguments of the command line.
        prompts: the prompts, each one once.
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
        """Return what the reports of both commands say of the measurement; ``command`` repeats it."""
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
        with (
            Store(args.out, folder_setup(facts.model, args.server_options)) as store,
            progress_bars(console) as progress,
        ):
            made = await make_prompts(options, client.tokenizer, progress)
            if not options.compares_text:
                made = [replace(prompt, max_tokens=0) for prompt in made]
            if facts.max_model_len is not None:
                refuse_long(made, facts.max_model_len, num_logprobs)
            prompts = distinct(made)
            yield Session(args, client, facts, store, progress, prompts, len(made) - len(prompts))


async def checked_facts(client: Client, options: PromptOptions, star_plans: Sequence[str]) -> ServerFacts:
    """Return what the server says about itself.

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


async def make_prompts(options: PromptOptions, tokenizer: Tokenizer, progress: Progress) -> list[Prompt]:
    """Make the user's prompts, or those of all tasks and lengths; equal ones too.

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
