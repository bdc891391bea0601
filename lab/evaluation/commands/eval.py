"""`starling eval`: measures what Star Attention costs in answers, on the user's model and prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from starling.lab.command_line import add_options, given_options
from starling.lab.evaluation.commands.measuring import (
    OUT_HELP,
    Measurement,
    add_server_options,
    open_session,
    repeated,
    run_measurement,
)
from starling.lab.evaluation.comparison import compare, compare_depths, make_pairs
from starling.lab.evaluation.prompt_options import ALLOWED as ALLOWED_PLANS
from starling.lab.evaluation.prompt_options import EvalOptions, parse_options
from starling.lab.evaluation.report import Report, figure_png, html_report, summary, terminal_tables, worst, write_files
from starling.lab.evaluation.runner import evaluate, key_of

JSON_FILE, HTML_FILE, FIGURE_FILE = "results.json", "report.html", "differences.png"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `starling eval`."""
    parser = argparse.ArgumentParser(
        prog="starling eval",
        description="Measures what Star Attention costs in answers: dense and star plans, prompt by prompt.",
        epilog="With MODEL, all other options are those of `starling serve`, and MODEL comes before them. Exit code: 0 "
        "measured, 1 a request or the server failed, 2 unusable arguments, 130 interrupted. See docs/eval.md.",
        allow_abbrev=False,
    )
    add_server_options(parser)
    plans = {"flag": "--plan", "action": "append", "type": str, "metavar": "PLAN"}
    add_options(parser, EvalOptions, plans=plans | {"help": f"repeatable: {ALLOWED_PLANS}"})
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=OUT_HELP)
    return parser


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code: 0, 1 where a request or the server failed, 2 for unusable arguments, or 130."""
    args, serve_options = make_parser().parse_known_args(argv)
    return run_measurement("starling eval", args, serve_options, prepare)


def prepare(args: argparse.Namespace) -> Measurement:
    """Return the measurement that the arguments ask for (raises ValueError for what can't be measured)."""
    options = parse_options(EvalOptions, given_options(args, EvalOptions))
    return partial(measure, args, options)


async def measure(args: argparse.Namespace, options: EvalOptions, target: Sequence[str], console: Console) -> int:
    """Make the prompts, send them, and write the results; returns 0.

    Args:
        target: the arguments that name the server, for the command in the report.

    Raises:
        ServerError: a request failed.
        ValueError: the folder has results of another model, or a prompt can't be made or sent.
    """
    plans = options.all_plans
    star_plans = [plan.name for plan in plans if not plan.is_dense]
    async with open_session(args, options, console, star_plans, options.logprobs) as session:
        prompts, store, model = session.prompts, session.store, session.facts.model
        if session.num_equal:
            console.print(f"{session.num_equal} prompts are equal to others, and are left out")
        keys = {key_of(prompt, plan, model, options.logprobs) for prompt in prompts for plan in plans}
        found = len(keys & store.answers.keys())
        if store.answers:
            console.print(f"found {found} of {len(keys)} answers in {escape(str(args.out))}")
        # The time left is that of the new answers: those that were found take none.
        bar = session.progress.add_task("answers", total=len(keys) - found)
        answers = await evaluate(
            prompts,
            plans,
            session.client,
            num_logprobs=options.logprobs,
            concurrency=args.concurrency,
            store=store,
            on_answer=lambda answer: session.progress.advance(bar),
        )
    pairs = make_pairs(prompts, answers)
    report = Report(
        **session.described(options.command([*target, *repeated(args, model)])),
        setup=options.setup(model, args.server_options),
        cells=compare(pairs),
        depths=compare_depths(pairs),
        different=worst(pairs),
    )
    write(report, args.out, console)
    return 0


def write(report: Report, folder: Path, console: Console) -> None:
    """Write JSON, figure and HTML, and print the table."""
    figure, no_figure = figure_or_reason(report)
    files = {JSON_FILE: report.model_dump_json(indent=1) + "\n", HTML_FILE: html_report(report, figure)}
    written = write_files(folder, {**files, FIGURE_FILE: figure})
    for table in terminal_tables(report):
        console.print(table)
    for text in summary(report.cells):
        console.print(escape(text))
    if figure is None:
        console.print(escape(f"no figure: {no_figure}"))
    console.print(escape(written))


def figure_or_reason(report: Report) -> tuple[bytes | None, str]:
    """Return the figure as PNG, or why there is none. The report does without, whatever fails in matplotlib."""
    try:
        figure = figure_png(report.cells)
    except Exception as error:
        return None, f"matplotlib failed: {type(error).__name__}: {error}"
    return figure, "it needs matplotlib (vllm-starling's extra `bench`), and a star plan"
