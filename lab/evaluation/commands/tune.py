"""`starling tune`: finds the cheapest star plan whose loss stays within a budget, on the user's model and prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from starling.config.entry import ENTRY, STAR_ADAPTER, STAR_HEADS
from starling.config.presets import PRESETS
from starling.config.star import FIELD_OF, FIELDS, QUALITY_SIZES, flat_name
from starling.lab.command_line import add_options, given_options
from starling.lab.evaluation.commands.measuring import (
    OUT_HELP,
    Measurement,
    Session,
    add_server_options,
    open_session,
    repeated,
    run_measurement,
)
from starling.lab.evaluation.plans import DENSE, Plan
from starling.lab.evaluation.prompt_options import parse_options, without_secrets
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.repeats import repeated_tokens
from starling.lab.evaluation.report import terminal_table, write_files
from starling.lab.evaluation.runner import key_of
from starling.lab.evaluation.server_process import option_name
from starling.lab.evaluation.store import Answer
from starling.lab.evaluation.tuning.candidates import Candidate, chosen_candidates, default_candidates
from starling.lab.evaluation.tuning.search_options import TuneOptions
from starling.lab.evaluation.tuning.tune_report import (
    COLUMNS,
    TuneReport,
    candidate_results,
    how_to_serve,
    html_report,
    make_chosen,
    make_closest,
    other_plans,
    summary,
    table_rows,
)
from starling.lab.evaluation.tuning.tuner import Trial, Tuner, Tuning, find_engine, halves, measured_plans

Measure = Callable[[argparse.Namespace, TuneOptions, Sequence[str], Console], Awaitable[int]]
"""What a command does with its options, the target of its requests and a console; returns the exit code."""

NOT_FOUND = 3
CHOSEN_HERE = {
    f"--{name.replace('_', '-')}"
    for name in (
        QUALITY_SIZES,
        *(flat_name(field) for field in FIELDS if field not in ("replicas", "shards", "adapter")),
    )
}
JSON_FILE, HTML_FILE, CONFIG_FILE = "tune.json", "tune.html", "additional-config.json"


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling tune`."""
    parser = argparse.ArgumentParser(
        prog="starling tune",
        description="Finds the cheapest star plan whose loss to dense, on your model and prompts, stays within a "
        "budget with 95 % confidence, and prints how to serve with it.",
        epilog="With MODEL, all other options are those of `starling serve`, and MODEL comes before them. Exit code: 0 "
        "found, 1 a request or the server failed, 2 unusable arguments, 3 no plan is shown to be within the budget, "
        "130 interrupted. See docs/tune.md.",
        allow_abbrev=False,
    )
    add_server_options(parser)
    candidates = "a candidate in place of the default ones, such as n/8 or B=4096,A=128,O=1024; repeatable"
    plans = {"flag": "--plan", "action": "append", "type": str, "metavar": "PLAN", "help": candidates}
    add_options(parser, TuneOptions, plans=plans)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=OUT_HELP)
    return parser


def run(argv: Sequence[str]) -> int:
    """Search; returns the exit code: 0, 3 where no plan is within the budget, or those of ``run_measurement``."""
    args, serve_options = make_parser().parse_known_args(argv)
    return run_measurement("starling tune", args, serve_options, partial(prepare, measure, serve_options))


def prepare(
    measure: Measure, serve_options: Sequence[str], args: argparse.Namespace, allowed: str = "--plan and --query-tokens"
) -> Measurement:
    """What the arguments ask for (raises ValueError for what can't be found).

    Args:
        allowed: in place of star options of the server.
    """
    for option in serve_options:
        if option_name(option) in CHOSEN_HERE:
            raise ValueError(f"{option} is refused: the search chooses it. Allowed: {allowed}")
    refuse_star_entry(serve_options, allowed)
    options = parse_options(TuneOptions, given_options(args, TuneOptions))
    return partial(measure, args, options)


def refuse_star_entry(serve_options: Sequence[str], allowed: str) -> None:
    """Refuse (ValueError) a preset or an entry of --additional-config that says how prompts are prefilled."""
    preset, config = (given_value(serve_options, name) for name in ("preset", "additional-config"))
    if preset in PRESETS and flat_name("segments") in PRESETS[preset].entry:
        raise ValueError(
            f"--preset {preset} is refused: its prompts are documents, whose loss is not that of other star "
            "blocks. Allowed: no preset; or `starling eval` with a plan that has S=, the text that starts a document"
        )
    try:
        entry = json.loads(config or "{}")[ENTRY]
        names = [name for name in entry if name in FIELD_OF or name == QUALITY_SIZES]
    except (ValueError, TypeError, KeyError):
        return  # the server refuses it, or it has no such entry
    if names:
        raise ValueError(f"{names[0]} in --additional-config is refused: the search chooses it. Allowed: {allowed}")


async def measure(args: argparse.Namespace, options: TuneOptions, target: Sequence[str], console: Console) -> int:
    """Make the prompts, search, and write the results; returns 0 or NOT_FOUND, and raises what ``search`` does."""
    found = await search(args, options, target, console, [options.mean_loss])
    served = served_arguments(args, target, found.model)
    report = make_report(options, found, found.tunings[0], served)
    write(report, args.out, without_secrets(served), console)
    return 0 if report.succeeded else NOT_FOUND


def served_arguments(args: argparse.Namespace, target: Sequence[str], model: str) -> Sequence[str]:
    """The model, and further options of the server, for a command that serves it."""
    return target if args.serve is not None else [model]


@dataclass(frozen=True)
class Found:
    """What was found on the prompts of one session.

    Attributes:
        described: when and on which server it was measured, and the command that repeats it.
        model: its name.
        page_size: tokens.
        halves: the prompts that were searched, and those held out.
        num_equal: prompts that were equal to others, and left out.
        earlier: plans under which held-out prompts had been measured in this folder before.
        tunings: for each budget.
    """

    described: dict[str, Any]
    model: str
    page_size: int
    halves: tuple[list[Prompt], list[Prompt]]
    num_equal: int
    earlier: list[str]
    tunings: list[Tuning]

    @property
    def prompts(self) -> list[Prompt]:
        return [*self.halves[0], *self.halves[1]]

    @property
    def chosen(self) -> set[str]:
        """The plans that held-out prompts were measured under by these searches."""
        return {tuning.chosen.candidate.plan.name for tuning in self.tunings if tuning.chosen is not None}


async def search(
    args: argparse.Namespace,
    options: TuneOptions,
    target: Sequence[str],
    console: Console,
    budgets: Sequence[float],
    *,
    leave_out: bool = False,
) -> Found:
    """Make the prompts, and search for each budget with the same candidates and prompts.

    Args:
        target: the arguments that name the server, for the command in the report.
        budgets: of the mean loss; 1 is 100 points.
        leave_out: plans of the options that can't be used.

    Raises:
        ServerError: a request failed.
        ValueError: the folder has answers of another model, or a prompt can't be made or sent.
    """
    num_logprobs = options.num_logprobs
    async with open_session(args, options, console, options.plans or ["n/8"], num_logprobs) as session:
        prompts, model = session.prompts, session.facts.model
        if session.store.answers:
            console.print(f"found {len(session.store.answers)} answers in {escape(str(args.out))}")
        options.refuse_few(len(prompts))
        page_size, kv_heads = await find_engine(session.client, prompts)
        if options.plans:
            candidates = chosen_candidates(options.plans, prompts, page_size, kv_heads, leave_out=leave_out)
        else:
            candidates = default_candidates(prompts, page_size, options.query_tokens, kv_heads)
        halved = halves(prompts)
        return Found(
            described=session.described(options.command([*target, *repeated(args, model)])),
            model=model,
            page_size=page_size,
            halves=halved,
            num_equal=session.num_equal,
            earlier=measured_plans(halved[1], session.store, model, num_logprobs),
            tunings=await search_all(session, options, halved, candidates, budgets),
        )


def make_report(options: TuneOptions, found: Found, tuning: Tuning, served: Sequence[str]) -> TuneReport:
    """The report of one of the searches, held against the budget of the options.

    Args:
        served: the model, and further options of the server.
    """
    loss, prompts = options.chosen_measure, found.prompts
    lengths = [len(prompt.token_ids) for prompt in prompts]
    return TuneReport(
        **found.described,
        measure=options.measure,
        budget=options.mean_loss,
        options=options.model_dump(mode="json"),
        page_size=found.page_size,
        prompts={
            "searched": len(found.halves[0]),
            "held_out": len(found.halves[1]),
            "equal_to_others": found.num_equal,
            "shortest": min(lengths),
            "longest": max(lengths),
            "tokens": sum(lengths),
            "repeated_tokens": repeated_tokens([prompt.token_ids for prompt in prompts]),
        },
        candidates=candidate_results(tuning, loss),
        chosen=make_chosen(tuning, loss, options.mean_loss, prompts, files_of(served)),
        closest=make_closest(tuning, loss, options.mean_loss),
        looked_at=[name for name in other_plans(found.earlier, tuning) if name not in found.chosen],
    )


async def search_all(
    session: Session,
    options: TuneOptions,
    halved: tuple[Sequence[Prompt], Sequence[Prompt]],
    candidates: Sequence[Candidate],
    budgets: Sequence[float],
) -> list[Tuning]:
    """Search for each budget, with one bar for all of them (raises ServerError: a request failed).

    The bar's total is what may be left at most, and falls with each candidate that is dropped.

    Args:
        halved: the prompts to search with, and those to confirm with.
        budgets: of the mean loss; 1 is 100 points.
    """
    search, held_out = halved
    plans, answers, model = [candidate.plan for candidate in candidates], session.store.answers, session.facts.model
    unanswered = {
        (prompt.name, plan.name)
        for plan in (DENSE, *plans)
        for prompt in (*search, *held_out)
        if key_of(prompt, plan, model, options.num_logprobs) not in answers
    }
    progress, tunings = session.progress, []
    bar = progress.add_task("answers, at most", total=len(unanswered))

    def most_left(left: Sequence[Plan], num_confirmed: int) -> int:
        """What may be asked at most, if these plans are left, and so many of them may be confirmed."""

        def missing(prompts: Sequence[Prompt], plan: Plan) -> int:
            return sum((prompt.name, plan.name) in unanswered for prompt in prompts)

        confirmed = sorted((missing(held_out, plan) for plan in left), reverse=True)[:num_confirmed]
        return sum(missing(search, plan) for plan in (DENSE, *left)) + missing(held_out, DENSE) + sum(confirmed)

    def on_answer(answer: Answer) -> None:
        unanswered.discard((answer.prompt, answer.plan))
        progress.advance(bar)

    tuner = Tuner(
        session.client,
        options.chosen_measure,
        num_logprobs=options.num_logprobs,
        concurrency=session.args.concurrency,
        store=session.store,
        on_answer=on_answer,
    )
    for number, budget in enumerate(budgets, 1):

        def on_round(left: Sequence[Trial], number: int = number) -> None:
            more = len(budgets) - number  # searches, which may have use for the plans that this one has dropped
            most = most_left(plans if more else [trial.candidate.plan for trial in left], 1 + more)
            task = progress.tasks[bar]
            progress.update(bar, total=min(task.total or 0, task.completed + most))

        tunings.append(await tuner.search(search, held_out, candidates, budget, on_round))
    progress.update(bar, visible=False)
    return tunings


def files_of(served: Sequence[str]) -> dict[str, str]:
    """The entries of ``additional_config`` that give a server the same --star-heads and --star-adapter, if any."""
    given = {name: given_value(served, name.replace("_", "-")) for name in (STAR_HEADS, STAR_ADAPTER)}
    return {name: str(Path(path).resolve()) for name, path in given.items() if path is not None}


def given_value(serve_options: Sequence[str], name: str) -> str | None:
    """The value of an option of the server, which vLLM takes with underscores too; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest="value")
    value: str | None = parser.parse_known_args(serve_options)[0].value
    return value


def write(report: TuneReport, folder: Path, served: Sequence[str], console: Console) -> None:
    """Write JSON, HTML and the server's options, and print the table and the result.

    Args:
        served: the model to serve, and further options of the server.
    """
    files = {JSON_FILE: report.model_dump_json(indent=1) + "\n", HTML_FILE: html_report(report, served)}
    config = json.dumps(report.chosen.additional_config) + "\n" if report.chosen and report.succeeded else None
    written = write_files(folder, {**files, CONFIG_FILE: config})
    title = f"Losses to dense in points of {report.measure}"
    console.print(terminal_table(title, COLUMNS, table_rows(report), wrap="result"))
    for text in summary(report):
        console.print(escape(text), soft_wrap=True)
    if report.succeeded:
        console.print(escape(how_to_serve(report, served)), soft_wrap=True)
    console.print(escape(written))
