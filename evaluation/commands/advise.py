"""`starling advise`: one command to serve a model with, and what it gains and costs on the user's prompts.

It is `starling tune` with three candidates, a budget and a measure that need few prompts, and the times of the longest
prompts.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from starling.evaluation.client import Client
from starling.evaluation.commands import tune
from starling.evaluation.commands.measuring import connect, run_measurement
from starling.evaluation.plans import DENSE, Plan
from starling.evaluation.prompt_options import without_secrets
from starling.evaluation.prompts import Prompt
from starling.evaluation.report import percent, points
from starling.evaluation.tuning.report import TuneReport, how_to_serve
from starling.evaluation.tuning.search_options import TuneOptions

BUDGET, MEASURE = 5.0, "logprob"
PLANS = ("n/4", "n/8", "n/16")
"""The candidates: the shares of a prompt that star_quality names, with the default anchor, overlap and dense heads."""
TIMED, TURNS = 2, 2  # the longest prompts, and how often each is timed with either plan
DEFAULT_FOLDER = "advice"


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling advise`: a few of those of `starling tune`."""
    parser = argparse.ArgumentParser(
        prog="starling advise",
        description="Measures on your model and prompts which star plan is good enough and how much sooner the first "
        "token comes, and prints one command to serve with. About a minute for each prompt of 10,000 tokens on a CPU.",
        epilog="All other options are those of `starling serve`, and MODEL comes before them. Exit code: 0 a plan is "
        "advised, 3 none is shown to be good enough, else as `starling tune`. `starling tune` has more options "
        "(docs/tune.md).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("serve", nargs="?", metavar="MODEL", help="start `starling serve MODEL` for the measurement, and stop it")
    add("--base-url", metavar="URL", help="a server that runs, in place of MODEL")
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='20 or more: JSONL with {"prompt": "..."} or {"messages": [...]}, and "answer" where you know it',
    )
    add(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="PERCENT",
        help=f"by how much less probable the tokens of the answers may become: {BUDGET:g}",
    )
    add(
        "--out", type=Path, default=Path(DEFAULT_FOLDER), metavar="DIR", help=f"folder of the results: {DEFAULT_FOLDER}"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Advise; returns the exit code, as `starling tune` does."""
    args, serve_options = make_parser().parse_known_args(argv)
    given = ["--budget", str(args.budget), "--measure", MEASURE, "--prompts", str(args.prompts), "--out", str(args.out)]
    given += [word for plan in PLANS for word in ("--plan", plan)]
    given += [] if args.base_url is None else ["--base-url", args.base_url]
    full = tune.make_parser().parse_args([*([] if args.serve is None else [args.serve]), *given])
    return run_measurement("starling advise", full, serve_options, partial(tune.prepare, measure, serve_options))


async def measure(args: argparse.Namespace, options: TuneOptions, target: Sequence[str], console: Console) -> int:
    """Search, time the plan that was found, write the results of the search, and print the advice.

    Returns:
        0, or NOT_FOUND of `starling tune`.

    Raises:
        ServerError, ValueError: as ``tune.search`` raises them.
    """
    report, prompts, tuning = await tune.search(args, options, target, console)
    served = without_secrets(tune.served_arguments(args, target, report.server["model"]))
    tune.write(report, args.out, served, console)
    speed = ""
    if report.succeeded and tuning.chosen is not None:
        async with connect(args) as client:
            speed = await measured_speed(client, prompts, tuning.chosen.candidate.plan)
    for text in advice(report, served, speed):
        console.print(escape(text), soft_wrap=True)
    return 0 if report.succeeded else tune.NOT_FOUND


async def measured_speed(client: Client, prompts: Sequence[Prompt], plan: Plan) -> str:
    """How much sooner the first token of the longest prompts comes, in a sentence (raises ServerError)."""
    longest = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))[:TIMED]
    pairs = []
    for prompt in longest:
        for _ in range(TURNS):
            dense = await client.seconds_to_first_token(prompt.token_ids, DENSE)
            pairs.append((dense, await client.seconds_to_first_token(prompt.token_ids, plan)))
    ratio = statistics.median(dense / star for dense, star in pairs)
    seconds = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return (
        f"{ratio:.2f} times sooner: {seconds[0]:.2f} s dense, {seconds[1]:.2f} s with star, for prompts of "
        f"{len(longest[-1].token_ids):,} to {len(longest[0].token_ids):,} tokens ({len(pairs)} pairs, nothing cached)"
    )


def advice(report: TuneReport, served: Sequence[str], speed: str) -> list[str]:
    """What to do, in lines.

    Args:
        served: the model, and further options of the server.
        speed: of ``measured_speed``.
    """
    found = report.chosen
    if found is None or not report.succeeded:
        assert report.closest is not None
        loss = points(report.closest.loss)
        return [
            "Advice: serve without star, or accept a larger loss.",
            f"  {shlex.join(['starling', 'serve', *served])}",
            f"  why: no plan is shown to keep the loss within {100 * report.budget:g} %. {report.closest.plan} is the "
            f"closest: {loss} % of the probability of the answers' tokens, on {report.closest.loss.prompts} prompts",
        ]
    return [
        "Advice:",
        f"  {how_to_serve(report, served)}",
        f"  gain: the first token comes {speed}; {percent(found.attended_keys)} of dense's attention work",
        f"  cost: the answers' tokens are {changed(found.confirmed.mean)} on average, and at most "
        f"{100 * found.confirmed.high:.1f} % less with a confidence of 95 % ({found.confirmed.prompts} prompts that "
        "did not choose the plan)",
        "  a single request can turn it off: star=off",
    ]


def changed(loss: float) -> str:
    """A mean loss of logprob in words: "1.2 % less probable"."""
    return f"{100 * abs(loss):.1f} % {'less' if loss > 0 else 'more'} probable"
