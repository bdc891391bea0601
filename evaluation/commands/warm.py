"""`starling warm`: has a server compute documents, so that they are in its library before somebody asks about them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from starling.evaluation.client import Client, ServerError
from starling.evaluation.commands.measuring import (
    FAILED,
    INTERRUPTED,
    LOG_FILE,
    UNUSABLE,
    add_server_options,
    check_arguments,
    connect,
    make_console,
    progress_bars,
    signals_as_interrupt,
)
from starling.evaluation.plans import Plan
from starling.evaluation.server import StartError, served
from starling.evaluation.warm_prompts import QUESTION, in_parallel, warm_prompt

LINE = '{"text": "..."}, or a text in quotes'
MAX_SHOWN = 10  # documents that failed


@dataclass
class Warmed:
    """What has been done.

    Attributes:
        sources: memory, host, storage, peer or computed -> tokens of documents; empty where the server does not say.
        failures: what was refused, by its line.
    """

    documents: int = 0
    tokens: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def make_parser() -> argparse.ArgumentParser:
    """The options of `starling warm`."""
    parser = argparse.ArgumentParser(
        prog="starling warm",
        description="Has a server compute documents, so that they are in its library (serve --star-library).",
        epilog="With MODEL, all other options are those of `starling serve`, --star-library among them, and MODEL "
        "comes before them. What the library has is found, not computed: the same command goes on after an "
        "interruption. Exit code: 0 done, 1 a document was refused or the server failed, 2 unusable arguments, 130 "
        "interrupted. See docs/library.md.",
        allow_abbrev=False,
    )
    add_server_options(parser)
    add = parser.add_argument
    add("--documents", type=Path, required=True, metavar="FILE", help=f"JSONL, a document in each line: {LINE}")
    add(
        "--head", type=Path, metavar="FILE", help="the text before the documents in every prompt, to the last character"
    )
    add("--concurrency", type=int, metavar="N", default=1, help="documents at the same time: 1")
    add("--timeout", type=float, metavar="SECONDS", default=600, help="that a document may take: 600")
    return parser


def run(argv: Sequence[str]) -> int:
    """Compute the documents; returns the exit code."""
    args, serve_options = make_parser().parse_known_args(argv)
    console = make_console()
    try:
        check_arguments(args, serve_options)
        head, documents = "" if args.head is None else read_text(args.head), read_documents(args.documents)
        with contextlib.ExitStack() as stack:
            stack.enter_context(signals_as_interrupt())
            if args.serve is not None:
                log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / LOG_FILE
                with console.status(f"starting starling serve {escape(args.serve)}"):
                    args.base_url = stack.enter_context(served(args.serve, serve_options, log))
            done = asyncio.run(warm(args, head, documents, console))
    except ValueError as error:
        print(f"starling warm: error: {error}", file=sys.stderr)
        return UNUSABLE
    except (ServerError, StartError, OSError) as error:
        print(f"starling warm: error: {error}", file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("starling warm: interrupted: the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    show(done, console)
    return FAILED if done.failures else 0


def read_text(path: Path) -> str:
    """The text of a file (raises ValueError: it can't be read)."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def read_documents(path: Path) -> list[tuple[int, str]]:
    """(line, text) of each document, equal ones once (raises ValueError: a line has no text)."""
    found: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            found.setdefault(text_of(line, f"{path}, line {number}"), number)
    if not found:
        raise ValueError(f"{path} has no documents")
    return [(number, text) for text, number in found.items()]


def text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Allowed: {LINE}.") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: there is no text. Allowed: {LINE}.")
    return text


async def warm(args: argparse.Namespace, head: str, documents: Sequence[tuple[int, str]], console: Console) -> Warmed:
    """Send a prompt of each document; a document that is refused is noted, and the others go on.

    Raises:
        ServerError: the server failed, or Starling is not activated on it.
    """
    done = Warmed()
    async with connect(args) as client:
        await client.refuse_without_starling("star_segments")
        start = await client.tokenizer.tokenize_prompt(head) if head else []
        end = await client.tokenizer.tokenize(QUESTION)
        waiting = iter(documents)
        with progress_bars(console) as progress:
            bar = progress.add_task("documents", total=len(documents))

            async def work() -> None:
                for line, text in waiting:
                    try:
                        await warm_document(client, start, text, end, done)
                    except DocumentRefused as error:
                        done.failures.append(f"line {line}: {error}")
                    progress.advance(bar)

            await in_parallel(work, args.concurrency)
        # vLLM begins to store what a step has computed in the next step.
        await client.complete(end, Plan("dense", {"star": "off"}), max_tokens=2)
    return done


class DocumentRefused(Exception):
    """The server refuses a document, and would refuse it again."""


async def warm_document(client: Client, head: list[int], text: str, question: list[int], done: Warmed) -> None:
    """Have one document computed (raises ServerError, or DocumentRefused where only this one is refused)."""
    document = await client.tokenizer.tokenize(text)
    prompt, starts = warm_prompt(head, document, question)
    plan = Plan("documents", {"star": "on", "star_segments": starts})  # type: ignore[dict-item]
    facts = await client.facts()
    if facts.max_model_len is not None and len(prompt) >= facts.max_model_len:
        raise DocumentRefused(f"its prompt has {len(prompt)} tokens, and the model takes {facts.max_model_len - 1}")
    completion = await client.complete(prompt, plan, max_tokens=1)
    done.documents += 1
    done.tokens += len(document)
    sources = (completion.plan or {}).get("document_sources")
    if sources:
        done.sources.update({str(kind): int(tokens) for kind, tokens in sources[0].items()})


def show(done: Warmed, console: Console) -> None:
    """Print what was done."""
    console.print(f"{done.documents} documents, {done.tokens:,} tokens")
    if done.sources:
        kinds = {"computed": "computed", "memory": "in memory", "host": "in host memory", "storage": "in files"}
        parts = [f"{done.sources[kind]:,} {name}" for kind, name in kinds.items() if done.sources[kind]]
        console.print(", ".join(parts))
    for failure in done.failures[:MAX_SHOWN]:
        console.print(escape(failure), style="red")
    if len(done.failures) > MAX_SHOWN:
        console.print(f"and {len(done.failures) - MAX_SHOWN} more", style="red")
