"""`starling advise`: one command to serve a model with, and what it gains and costs on the user's prompts."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from starling.config.entry import ENTRY, PRESET, STAR_ADAPTER, STAR_HEADS
from starling.config.quality import size_text
from starling.config.star import FIELD_OF, FIELDS, QUALITY_SIZES, flat_name
from starling.lab.evaluation.advice import (
    COLUMNS,
    LIMITS,
    NUM_BLOCKS,
    NUM_LOGPROBS,
    Advice,
    AdviseOptions,
    Candidate,
    advice_lines,
    chosen,
    document_lines,
    find_words,
    halves,
    is_within,
    plan_of,
    refuse_few,
    results,
    served_options,
    server_flags,
    table_rows,
)
from starling.lab.evaluation.answers import NotEngaged, ServerError
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.commands.measuring import (
    Measurement,
    Session,
    add_server_options,
    connect,
    open_session,
    repeated,
    run_measurement,
)
from starling.lab.evaluation.comparison import key_share, logprob_difference, make_pairs
from starling.lab.evaluation.prompt_options import DENSE, Plan, parse_options, without_secrets
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.report import terminal_table, write_files
from starling.lab.evaluation.runner import evaluate, key_of
from starling.lab.evaluation.server_process import option_name
from starling.scheduler.planning.sizes import DEFAULT_QUALITY

RUN = 32
"""Tokens that a text has at least: a page of the presets whose prompts have documents."""
BASE = 0x9E3779B97F4A7C15  # odd: its powers have inverses
INVERSE = pow(BASE, -1, 1 << 64)
Hashes = npt.NDArray[np.uint64]


def repeated_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens of prompts that stand in a text, of RUN tokens or more, that an earlier prompt has too.

    Without the tokens of the beginning that an earlier prompt has too: vLLM's prefix cache finds those.
    """
    if not prompts:
        return 0
    prefixes = [prefix_hashes(np.asarray(prompt, dtype=np.uint64)) for prompt in prompts]
    runs = [run_hashes(prefix) for prefix in prefixes]
    found = 0
    for begin, starts in zip(seen_before([prefix[1:] for prefix in prefixes]), seen_before(runs), strict=True):
        num_common = len(begin) if begin.all() else int(begin.argmin())
        changes = np.zeros(len(begin) + 1, dtype=np.int64)
        changes[: len(starts)] += starts
        changes[RUN : RUN + len(starts)] -= starts
        found += int(np.count_nonzero(changes.cumsum()[num_common : len(begin)]))
    return found


def prefix_hashes(tokens: Hashes) -> Hashes:
    """Return (n + 1,) the hash of each beginning of n tokens: a polynomial in BASE, modulo 2^64."""
    powers = np.full(len(tokens), BASE, dtype=np.uint64)
    powers[:1] = 1
    terms = (tokens + np.uint64(1)) * np.multiply.accumulate(powers)
    return np.concatenate([np.zeros(1, dtype=np.uint64), np.add.accumulate(terms, dtype=np.uint64)])


def run_hashes(prefix: Hashes) -> Hashes:
    """Return (n - RUN + 1,) the hash of each RUN tokens, wherever they stand."""
    sums = prefix[RUN:] - prefix[:-RUN]
    powers = np.full(len(sums), INVERSE, dtype=np.uint64)
    powers[:1] = 1
    return sums * np.multiply.accumulate(powers)


def seen_before(hashes: Sequence[Hashes]) -> list[npt.NDArray[np.bool_]]:
    """Return, for each hash of each prompt, whether an earlier prompt has it."""
    owners = np.repeat(np.arange(len(hashes)), [len(each) for each in hashes])
    _, first, which = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    seen = owners[first][which] < owners
    return np.split(seen, np.cumsum([len(each) for each in hashes])[:-1])


NOT_FOUND = 3
MEASURED_HERE = {
    f"--{name.replace('_', '-')}"
    for name in (
        QUALITY_SIZES,
        *(flat_name(field) for field in FIELDS if field not in ("replicas", "shards", "adapter")),
    )
}
JSON_FILE, CONFIG_FILE = "advice.json", "additional-config.json"
LEAST_GAIN = 1.05  # below it, four pairs of times say nothing
TIMED, TURNS = 2, 2  # the longest prompts, and how often each is timed with either plan
DEFAULT_FOLDER = "advice"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `starling advise`."""
    parser = argparse.ArgumentParser(
        prog="starling advise",
        description="Measures on your model and prompts which star plan is good enough and how much sooner the first "
        "token comes, and prints one command to serve with; also what documents would find cached. About a minute for "
        "each prompt of 10,000 tokens on a CPU.",
        epilog="All other options are those of `starling serve`, and MODEL comes before them. Exit code: 0 a plan is "
        "advised, 1 a request or the server failed, 2 unusable arguments, 3 no plan is shown to be good enough, 130 "
        "interrupted. See docs/advise.md; `starling eval` measures plans that you choose.",
        allow_abbrev=False,
    )
    add_server_options(parser)
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
    """Advise; returns the exit code: 0, NOT_FOUND, or those of ``run_measurement``."""
    args, serve_options = make_parser().parse_known_args(argv)
    return run_measurement("starling advise", args, serve_options, partial(prepare, serve_options))


def prepare(serve_options: Sequence[str], args: argparse.Namespace) -> Measurement:
    """Return the measurement that the arguments ask for (raises ValueError for what can't be measured)."""
    for option in serve_options:
        if option_name(option) in MEASURED_HERE:
            raise ValueError(f"{option} is refused: it is what is measured. Allowed: options of other things")
    refuse_star_entry(serve_options)
    return partial(measure, args, parse_options(AdviseOptions, {"prompts": args.prompts}))


def refuse_star_entry(serve_options: Sequence[str]) -> None:
    """Refuse (ValueError) a preset or an entry of --additional-config that says how prompts are prefilled."""
    preset, config = (given_value(serve_options, name) for name in (PRESET, "additional-config"))
    if preset is not None:
        raise ValueError(
            f"--preset {preset} is refused: it says how prompts are prefilled, which is what is measured. Allowed: no "
            "preset; or for documents `starling eval` with a plan that has S=, the text that starts a document"
        )
    try:
        entry = json.loads(config or "{}")[ENTRY]
        names = [name for name in entry if name in FIELD_OF or name in (PRESET, QUALITY_SIZES)]
    except (ValueError, TypeError, KeyError):
        return  # the server refuses it, or it has no such entry
    if names:
        raise ValueError(f"{names[0]} in --additional-config is refused: it is what is measured. Allowed: none")


def given_value(serve_options: Sequence[str], name: str) -> str | None:
    """Return the value of an option of the server, which vLLM takes with underscores too, or None if not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest="value")
    value: str | None = parser.parse_known_args(serve_options)[0].value
    return value


def files_of(served: Sequence[str]) -> dict[str, str]:
    """Return the entries of ``additional_config`` for the server's --star-heads and --star-adapter, if any."""
    given = {name: given_value(served, name.replace("_", "-")) for name in (STAR_HEADS, STAR_ADAPTER)}
    return {name: str(Path(path).resolve()) for name, path in given.items() if path is not None}


async def measure(args: argparse.Namespace, options: AdviseOptions, target: Sequence[str], console: Console) -> int:
    """Measure the candidates, time the one that is advised, write the results, and print the advice.

    Args:
        target: the arguments that name the server, for the command in the report.

    Returns:
        0, or NOT_FOUND.

    Raises:
        ServerError: a request failed.
        ValueError: the folder has answers of another model, or the prompts can't be made, sent or used.
    """
    names = [size_text(number) for number in NUM_BLOCKS]
    async with open_session(args, options, console, names, NUM_LOGPROBS) as session:
        if session.store.answers:
            console.print(f"found {len(session.store.answers)} answers in {escape(str(args.out))}")
        refuse_few(len(session.prompts))
        write_files(args.out, dict.fromkeys((JSON_FILE, CONFIG_FILE)))  # those of an earlier run
        searched, held_out = halves(session.prompts)
        candidates = await measure_candidates(session, searched, held_out)
    served = target if args.serve is not None else [session.facts.model]
    lengths = [len(prompt.token_ids) for prompt in session.prompts]
    words = find_words(candidates)
    found = served_options(words, min(lengths))
    advice = Advice(
        **session.described(options.command([*target, *repeated(args, session.facts.model)])),
        prompts={
            "searched": len(searched),
            "held_out": len(held_out),
            "equal_to_others": session.num_equal,
            "shortest": min(lengths),
            "longest": max(lengths),
            "tokens": sum(lengths),
            "repeated_tokens": repeated_tokens([prompt.token_ids for prompt in session.prompts]),
        },
        candidates=results(candidates),
        words=words,
        flags=server_flags(found),
        additional_config={ENTRY: found | files_of(served)} if found else None,
    )
    write(advice, args.out, console)
    speed, pays = "", True
    if found:
        with console.status("the longest prompts, dense and with star"):
            async with connect(args) as client:
                plan = plan_of(words[DEFAULT_QUALITY].num_blocks)
                speed, pays = await measured_speed(client, session.prompts, plan)
    served = without_secrets(served)
    for text in [*advice_lines(advice, served, speed, pays=pays), *document_lines(advice, served)]:
        console.print(escape(text), soft_wrap=True)
    return 0 if found else NOT_FOUND


async def measure_candidates(
    session: Session, searched: Sequence[Prompt], held_out: Sequence[Prompt]
) -> list[Candidate]:
    """Return the candidates with their losses, the cheapest first.

    The losses are on all searched prompts, and of the chosen candidates also on the held-out ones. None is measured
    that costs more than one that is within the strictest limit. None is left that costs what dense attention does: it
    would be unmeasured on longer prompts.

    Raises:
        ServerError: a request failed.
        ValueError: the prompts are too short for any candidate.
    """
    plans = await usable_plans(session)
    keys = {
        key_of(prompt, plan, session.facts.model, NUM_LOGPROBS)
        for prompt in session.prompts
        for plan in (DENSE, *map(plan_of, plans))
    }
    bar = session.progress.add_task("answers, at most", total=len(keys - session.store.answers.keys()))
    candidates: list[Candidate] = []
    for number in plans:
        candidate = Candidate(number)
        candidate.searched, candidate.keys = await measure_losses(session, searched, candidate.plan, bar)
        if candidate.attended_keys >= 1:
            continue
        candidates.append(candidate)
        if is_within(candidate.searched, min(LIMITS.values())):
            break
    if not candidates:
        shortest = shortest_of(session.prompts)
        raise ValueError(
            f"the prompts are too short for star blocks of whole pages: {shortest.name} has {len(shortest.token_ids)} "
            "tokens. Allowed: longer prompts, or a smaller --block-size of the server"
        )
    to_confirm = [chosen(candidates, limit) for limit in LIMITS.values()]
    for candidate in candidates:
        if candidate not in to_confirm:
            continue
        candidate.held_out, shares = await measure_losses(session, held_out, candidate.plan, bar)
        candidate.keys += shares
    session.progress.update(bar, visible=False)
    return candidates


async def usable_plans(session: Session) -> list[int]:
    """Return the numbers of star blocks of the candidates, the cheapest first (raises ServerError).

    Without those under which the shortest prompt is dense, or has blocks of the same size, of whole pages, as with
    fewer blocks.
    """
    sizes: dict[int, int] = {}
    for number in reversed(NUM_BLOCKS):
        try:
            answer = await session.client.complete(shortest_of(session.prompts).token_ids, plan_of(number), 1)
        except NotEngaged:
            continue
        assert answer.plan is not None
        sizes.setdefault(int(answer.plan["block_size"]), number)
    return list(reversed(sizes.values()))


def shortest_of(prompts: Sequence[Prompt]) -> Prompt:
    return min(prompts, key=lambda prompt: len(prompt.token_ids))


async def measure_losses(
    session: Session, prompts: Sequence[Prompt], plan: Plan, bar: TaskID
) -> tuple[list[float], list[float]]:
    """Return (losses in nats for each token of the answer, query-key pairs as a share of dense's), of each prompt.

    Raises:
        ServerError: a request failed, or an answer has no token that could be compared.
    """
    answers = await evaluate(
        prompts,
        [plan],
        session.client,
        num_logprobs=NUM_LOGPROBS,
        concurrency=session.args.concurrency,
        store=session.store,
        on_answer=lambda answer: session.progress.advance(bar),
    )
    pairs = [pair for pair in make_pairs(prompts, answers) if pair.answer.plan == plan.name]
    for pair in pairs:
        if not pair.answer.scores:
            raise ServerError(f"the answer to {pair.prompt.name} has no token that could be compared")
    return [-logprob_difference(pair) for pair in pairs], [key_share(pair.answer) or 1.0 for pair in pairs]


async def measured_speed(client: Client, prompts: Sequence[Prompt], plan: Plan) -> tuple[str, bool]:
    """Return how much sooner the first token of the longest prompts comes, and whether it does (raises ServerError)."""
    longest = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))[:TIMED]
    pairs = []
    for prompt in longest:
        for _ in range(TURNS):
            dense = await client.seconds_to_first_token(prompt.token_ids, DENSE)
            pairs.append((dense, await client.seconds_to_first_token(prompt.token_ids, plan)))
    ratio = statistics.median(dense / star for dense, star in pairs)
    seconds = [statistics.median(times) for times in zip(*pairs, strict=True)]
    text = (
        f"{f'{ratio:.2f} times' if ratio >= LEAST_GAIN else 'no'} sooner: {seconds[0]:.2f} s dense, {seconds[1]:.2f} s "
        f"with star, for prompts of {len(longest[-1].token_ids):,} to {len(longest[0].token_ids):,} tokens "
        f"({len(pairs)} pairs, nothing cached)"
    )
    return text, ratio >= LEAST_GAIN


def write(advice: Advice, folder: Path, console: Console) -> None:
    """Write the results and the server's options, and print the table."""
    config = json.dumps(advice.additional_config) + "\n" if advice.additional_config else None
    written = write_files(folder, {JSON_FILE: advice.model_dump_json(indent=1) + "\n", CONFIG_FILE: config})
    title = "By how many percent less probable the answers' tokens become"
    console.print(terminal_table(title, COLUMNS, table_rows(advice)))
    console.print(escape(written))
