"""`starling eval`: measures what Star Attention costs in answers, on the user's model and prompts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from engine_ext.evaluation.client import Client, ServerError
from engine_ext.evaluation.figure import figure_png
from engine_ext.evaluation.options import EvalOptions, parse_options
from engine_ext.evaluation.plans import ALLOWED as ALLOWED_PLANS
from engine_ext.evaluation.prompts import Prompt, own_prompt, read_own_prompts, task_prompts
from engine_ext.evaluation.report import Report, html_report, summary, terminal_table, worst
from engine_ext.evaluation.runner import evaluate, key_of
from engine_ext.evaluation.server import StartError, served
from engine_ext.evaluation.statistics import compare, make_pairs
from engine_ext.evaluation.store import Store, check_setup, stored_setup
from engine_ext.evaluation.tasks import GROUPS, TASKS

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130
SPEED_SECONDS = 3600  # a long prompt takes minutes, and the time left is estimated from those of the last hour
KEY_ENV, SERVE_KEY_ENV = "OPENAI_API_KEY", "VLLM_API_KEY"
JSON_FILE, HTML_FILE, FIGURE_FILE, LOG_FILE = "results.json", "report.html", "differences.png", "server.log"


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling eval`."""
    defaults = {name: field.default for name, field in EvalOptions.model_fields.items()}
    parser = argparse.ArgumentParser(
        prog="starling eval",
        description="Measures what Star Attention costs in answers: dense and star plans, prompt by prompt.",
        epilog="With MODEL, all other options are those of `starling serve`. Exit code: 0 measured, 1 a request or the "
        "server failed, 2 unusable arguments, 130 interrupted. See docs/eval.md.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("serve", nargs="?", metavar="MODEL", help="start `starling serve MODEL` for the evaluation, and stop it")
    add("--base-url", metavar="URL", help="a server that runs, such as http://localhost:8000")
    add("--model", metavar="NAME", help="the model's name on the server; needed where it has several")
    add("--api-key", metavar="KEY", help=f"of the server; default: the environment variable {KEY_ENV}")
    add("--tasks", type=comma, default=(), metavar="A,B", help=f"of {', '.join((*GROUPS, *TASKS))}; niah: all niah_...")
    add("--lengths", type=comma, metavar="N,M", default=defaults["lengths"], help="tokens of prompt and answer: 4096")
    add(
        "--prompts-per-cell",
        type=int,
        metavar="N",
        default=defaults["prompts_per_cell"],
        help="of each task and length",
    )
    add("--prompts", type=Path, metavar="FILE", help="your own prompts as JSONL, in place of tasks")
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        default=defaults["max_tokens"],
        help="of answers to your own prompts: 128",
    )
    add("--plan", action="append", dest="plans", default=[], metavar="PLAN", help=f"repeatable: {ALLOWED_PLANS}")
    add("--prompt-format", choices=("chat", "text"), default=defaults["prompt_format"], help="of tasks: chat template?")
    add("--prompt-seed", type=int, metavar="N", default=defaults["prompt_seed"], help="of the tasks' prompts: 0")
    add("--logprobs", type=int, metavar="N", default=0, help="also compare distributions at N tokens of the answer")
    add("--concurrency", type=int, metavar="N", default=1, help="prompts at the same time: 1")
    add("--timeout", type=float, metavar="SECONDS", default=600, help="that an answer may take: 600")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results; a run that was ended goes on")
    return parser


def comma(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(","))


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code: 0, 1 where a request or the server failed, 2 for unusable arguments, or 130."""
    args, serve_options = make_parser().parse_known_args(argv)
    console = Console(highlight=False)
    try:
        check_arguments(args, serve_options)
        options = parse_options({name: getattr(args, name) for name in EvalOptions.model_fields})
        before = stored_setup(args.out)
        if before is not None:  # refused before a server starts; the model's name is known only then
            check_setup(args.out, options.setup(before.get("model", "")))
        with contextlib.ExitStack() as stack:
            stack.enter_context(signals_as_interrupt())
            if args.serve is not None:
                log = args.out / LOG_FILE
                with console.status(f"starting starling serve {escape(args.serve)} (log: {escape(str(log))})"):
                    args.base_url = stack.enter_context(served(args.serve, serve_options, log))
            target = [args.serve, *serve_options] if args.serve else ["--base-url", args.base_url]
            asyncio.run(measure(args, options, target, console))
    except ValueError as error:
        print(f"starling eval: error: {error}", file=sys.stderr)
        return UNUSABLE
    except (ServerError, StartError) as error:
        print(f"starling eval: error: {error}\n{how_to_resume(args.out)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"starling eval: interrupted\n{how_to_resume(args.out)}", file=sys.stderr)
        return INTERRUPTED
    return 0


def how_to_resume(out: Path) -> str:
    return f"The answers so far are in {out}: the same command goes on from there."


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the evaluation as Ctrl-C does, so that its server is stopped."""
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
        raise ValueError("either MODEL, which is served for the evaluation, or --base-url is needed, and not both")
    if args.base_url is not None and (not args.base_url.startswith(("http://", "https://")) or "@" in args.base_url):
        raise ValueError(f"base_url={args.base_url!r} is refused. Allowed: http://HOST or https://HOST, and --api-key")
    if args.serve is not None and args.api_key:
        raise ValueError(f"--api-key goes with --base-url. The server of MODEL takes that of {SERVE_KEY_ENV}")
    for name in ("concurrency", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)} is refused: it must be more than 0")


async def measure(args: argparse.Namespace, options: EvalOptions, target: Sequence[str], console: Console) -> None:
    """Make the prompts, send them, and write the results.

    Args:
        target: the arguments that name the server, for the command in the report.

    Raises:
        ServerError: a request failed.
        ValueError: the folder has results of another setup, or a prompt can't be made or sent.
    """
    key = args.api_key or os.environ.get(KEY_ENV if args.serve is None else SERVE_KEY_ENV)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("left")]
    async with Client(args.base_url, args.model, key, args.timeout) as client:
        facts = await client.facts()
        setup = options.setup(facts.model)
        with Store(args.out, setup) as store:
            with Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS) as progress:
                prompts = await make_prompts(options, client, progress)
                refuse_long(prompts, facts.max_model_len)
                plans = options.all_plans
                keys = {key_of(prompt, plan, facts.model, options.logprobs) for prompt in prompts for plan in plans}
                found = len(keys & store.answers.keys())
                if store.answers:
                    console.print(f"found {found} of {len(keys)} answers in {escape(str(args.out))}")
                # The time left is that of the new answers: those that were found take none.
                bar = progress.add_task("answers", total=len(keys) - found)
                answers = await evaluate(
                    prompts,
                    plans,
                    client,
                    num_logprobs=options.logprobs,
                    concurrency=args.concurrency,
                    store=store,
                    on_answer=lambda answer: progress.advance(bar),
                )
            pairs = make_pairs(prompts, answers)
            report = Report(
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                setup=setup,
                command=options.command([*target, "--model", facts.model]),
                server={"base_url": client.base_url, **vars(facts)},
                cells=compare(pairs),
                different=worst(pairs),
            )
            write(report, args.out, console)


async def make_prompts(options: EvalOptions, client: Client, progress: Progress) -> list[Prompt]:
    """The user's prompts, or those of all tasks and lengths."""
    if options.prompts is not None:
        lines = read_own_prompts(options.prompts)
        bar = progress.add_task("prompts", total=len(lines))
        prompts = []
        for line, own in lines:
            prompts.append(await own_prompt(own, line, options.max_tokens, client))
            progress.advance(bar)
        return prompts
    cells = [(task, length) for length in options.lengths for task in options.chosen_tasks]
    bar, prompts = progress.add_task("prompts", total=len(cells)), []
    settings: dict[str, Any] = {"seed": options.prompt_seed, "prompt_format": options.prompt_format}
    for task, length in cells:
        prompts += await task_prompts(task, length, options.prompts_per_cell, tokenizer=client, **settings)
        progress.advance(bar)
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


def write(report: Report, folder: Path, console: Console) -> None:
    """Write JSON, figure and HTML, and print the table."""
    (folder / JSON_FILE).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    figure, written = figure_png(report.cells), [JSON_FILE, HTML_FILE]
    if figure is not None:
        (folder / FIGURE_FILE).write_bytes(figure)
        written.append(FIGURE_FILE)
    (folder / HTML_FILE).write_text(html_report(report, figure), encoding="utf-8")
    console.print(terminal_table(report.cells))
    for text in summary(report.cells):
        console.print(escape(text))
    if figure is None:
        console.print("no figure: it needs matplotlib (pip install 'vllm-starling[bench]'), and a difference of scores")
    console.print(f"written to {escape(str(folder))}: {', '.join(written)}")
