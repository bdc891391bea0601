"""`starling advise`: one command to serve a model with, and what it gains and costs on the user's prompts.

It is `starling tune` with three candidates, a budget and a measure that need few prompts, and the times of the longest
prompts.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from starling.config.entry import ENTRY
from starling.config.quality import size_text, size_texts
from starling.config.star import QUALITY_SIZES, num_blocks, parse_options
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.commands import tune
from starling.lab.evaluation.commands.measuring import add_target_options, connect, run_measurement
from starling.lab.evaluation.plans import DENSE, Plan, parse_plan
from starling.lab.evaluation.prompt_options import without_secrets
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.report import percent, points
from starling.lab.evaluation.tuning.candidates import served_options
from starling.lab.evaluation.tuning.search_options import Measure, TuneOptions
from starling.lab.evaluation.tuning.tune_report import (
    TuneReport,
    Word,
    how_to_serve,
    make_closest,
    make_loss,
    server_flags,
)
from starling.lab.evaluation.tuning.tuner import Tuning
from starling.scheduler.star.sizes import DEFAULT_QUALITY

MEASURE = "logprob"
LIMITS = {"careful": 2.0, "balanced": 5.0, "fast": 10.0}
"""By how many percent less probable the tokens of the answers may become under each word of star_quality."""
PLANS = ("n/4", "n/8", "n/16")
"""The candidates, with the default anchor, overlap and dense heads."""
LEAST_REPEATED = 0.1  # of the prompts' tokens, for which documents are worth a line
LEAST_GAIN = 1.05  # below it, four pairs of times say nothing
TIMED, TURNS = 2, 2  # the longest prompts, and how often each is timed with either plan
DEFAULT_FOLDER = "advice"


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling advise`: a few of those of `starling tune`."""
    parser = argparse.ArgumentParser(
        prog="starling advise",
        description="Measures on your model and prompts which star plan is good enough and how much sooner the first "
        "token comes, and prints one command to serve with; also what documents would find cached. About a minute for "
        "each prompt of 10,000 tokens on a CPU.",
        epilog="All other options are those of `starling serve`, and MODEL comes before them. Exit code: 0 a plan is "
        "advised, 3 none is shown to be good enough, else as `starling tune`. `starling tune` has more options "
        "(docs/tune.md).",
        allow_abbrev=False,
    )
    add_target_options(parser)
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='20 or more, of 2,000 tokens or more: JSONL with {"prompt": "..."} or {"messages": [...]}, and "answer" '
        "where you know it",
    )
    add(
        "--out", type=Path, default=Path(DEFAULT_FOLDER), metavar="DIR", help=f"folder of the results: {DEFAULT_FOLDER}"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Advise; returns the exit code, as `starling tune` does."""
    args, serve_options = make_parser().parse_known_args(argv)
    given = ["--budget", str(LIMITS[DEFAULT_QUALITY]), "--measure", MEASURE]
    given += ["--prompts", str(args.prompts), "--out", str(args.out)]
    given += [word for plan in PLANS for word in ("--plan", plan)]
    given += [] if args.base_url is None else ["--base-url", args.base_url]
    full = tune.make_parser().parse_args([*([] if args.serve is None else [args.serve]), *given])
    prepare = partial(tune.prepare, measure, serve_options, allowed="none, or `starling tune --plan`")
    return run_measurement("starling advise", full, serve_options, prepare)


async def measure(args: argparse.Namespace, options: TuneOptions, target: Sequence[str], console: Console) -> int:
    """Search, time the plan that was found, write the results of the search, and print the advice.

    Returns:
        0, or NOT_FOUND of `starling tune`.

    Raises:
        ServerError, ValueError: as ``tune.search`` raises them.
    """
    budgets = [limit / 100 for limit in LIMITS.values()]
    found = await tune.search(args, options, target, console, budgets, leave_out=True)
    tunings = dict(zip(LIMITS, found.tunings, strict=True))
    words = measured_words(tunings, options.chosen_measure)
    served = tune.served_arguments(args, target, found.model)
    report = tune.make_report(options, found, tunings[words[DEFAULT_QUALITY].limit], served)
    report, served = with_words(report, words, tune.files_of(served)), without_secrets(served)
    tune.write(report, args.out, served, console)
    speed = ""
    if report.succeeded and report.chosen is not None:
        with console.status("the longest prompts, dense and with star"):
            async with connect(args) as client:
                speed = await measured_speed(client, found.prompts, parse_plan(report.chosen.plan))
    for text in [*advice(report, words, served, speed), *document_advice(report, served)]:
        console.print(escape(text), soft_wrap=True)
    return 0 if report.succeeded else tune.NOT_FOUND


def measured_words(tunings: Mapping[str, Tuning], measure: Measure) -> dict[str, Word]:
    """What each word stands for: the cheapest plan that both halves show to be within its limit, or a stricter one.

    Args:
        tunings: word -> the search for its limit.
    """
    words: dict[str, Word] = {}
    shown: Word | None = None
    for word, limit in LIMITS.items():
        tuning = tunings[word]
        closest = make_closest(tuning, measure, limit / 100)
        if closest is None and tuning.chosen is not None:
            number = num_blocks(parse_options(tuning.chosen.candidate.plan.options)) or 1
            if shown is None or number > shown.num_blocks:
                shown = Word(word, number, make_loss(tuning.held_out, measure))
        words[word] = shown or Word(word, 1, closest=closest)
    return words


def with_words(report: TuneReport, words: Mapping[str, Word], entry: Mapping[str, str]) -> TuneReport:
    """The report with the words, and with a server's options that give them in place of the plan's size.

    Args:
        entry: what Starling's entry in ``additional_config`` has beside the plan.
    """
    report = report.model_copy(update={"words": dict(words)})
    if report.chosen is None:
        return report
    sizes = size_texts({word: found.num_blocks for word, found in words.items()})
    options = served_options(parse_plan("default"), report.prompts["shortest"])
    flags = server_flags(options | {QUALITY_SIZES: ",".join(f"{word}={size}" for word, size in sizes.items())})
    changed = {"flags": flags, "additional_config": {ENTRY: {**options, **entry, QUALITY_SIZES: sizes}}}
    return report.model_copy(update={"chosen": report.chosen.model_copy(update=changed)})


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
    sooner = f"{ratio:.2f} times sooner" if ratio >= LEAST_GAIN else "no sooner, so serve such prompts without star"
    return (
        f"{sooner}: {seconds[0]:.2f} s dense, {seconds[1]:.2f} s with star, for prompts of "
        f"{len(longest[-1].token_ids):,} to {len(longest[0].token_ids):,} tokens ({len(pairs)} pairs, nothing cached)"
    )


def advice(report: TuneReport, words: Mapping[str, Word], served: Sequence[str], speed: str) -> list[str]:
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
    others = [f"  star_quality={word}: {meaning(words[word], LIMITS[word])}" for word in ("fast", "careful")]
    return [
        "Advice:",
        f"  {how_to_serve(report, served)}",
        f"  gain: the first token comes {speed}; {percent(found.attended_keys)} of dense's attention work",
        f"  cost: the answers' tokens are {changed(found.confirmed.mean)} on average, and at most "
        f"{100 * found.confirmed.high:.1f} % less with a confidence of 95 % ({found.confirmed.prompts} prompts that "
        "did not choose the plan)",
        "  a single request can have another quality, or star=off:",
        *others,
    ]


def document_advice(report: TuneReport, served: Sequence[str]) -> list[str]:
    """What documents would find of the prompts' texts, in lines; none where that is little.

    Args:
        served: the model, and further options of the server.
    """
    repeated, tokens = report.prompts["repeated_tokens"], report.prompts["tokens"]
    if repeated < LEAST_REPEATED * tokens:
        return []
    return [
        f"Or documents, if each is a message: {repeated:,} of the prompts' {tokens:,} tokens "
        f"({percent(repeated / tokens)}) are texts that an earlier prompt has too, at another place, and documents "
        "find them cached (docs/recipe-rag.md):",
        f"  {shlex.join(['starling', 'serve', *served, '--preset', 'rag'])}",
    ]


def meaning(word: Word, limit: float) -> str:
    """What a word stands for, and what that costs.

    Args:
        limit: percent, of the word.
    """
    if word.loss is not None:
        loss = f"at most {100 * word.loss.high:.1f} % less probable"
        return f"{size_text(word.num_blocks)}, {loss}, within its limit of {limit:g} %"
    needed = word.closest.prompts_needed if word.closest else None
    hint = f"; about {needed} prompts may show {word.closest.plan}" if word.closest and needed else ""
    return f"dense, since no plan is shown to be within its limit of {limit:g} %{hint}"


def changed(loss: float) -> str:
    """A mean loss of logprob in words: "1.2 % less probable"."""
    return f"{100 * abs(loss):.1f} % {'less' if loss > 0 else 'more'} probable"
