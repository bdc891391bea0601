"""`starling warm`: has a server compute documents, so that they are in its library before somebody asks about them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from starling.config.warm_prompts import (
    CHAT,
    FORMS,
    NO_FORM,
    NO_HEAD,
    NO_LIBRARY,
    OTHER_DOCUMENT,
    OTHER_QUESTION,
    QUESTION,
    TEXTS,
    documents_of,
    in_parallel,
    joined_text,
    joined_tokens,
    message,
    tokens_found,
)
from starling.lab.command_line import FAILED, make_console, progress_bars, run_command
from starling.lab.evaluation.answers import RequestRefused, ServerError
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.commands.measuring import LOG_FILE, add_server_options, check_arguments, connect
from starling.lab.evaluation.prompts import read_json_lines
from starling.lab.evaluation.server_process import served

LINE = '{"text": "..."}, a text in quotes, or for chats a message {"role": ..., "content": ...}'
SAYS_CACHED = "--enable-prompt-tokens-details"
MAX_SHOWN = 10  # documents that failed


Message = dict[str, Any]


@dataclass
class Warmed:
    """Counts of the work that is done.

    Attributes:
        tokens: tokens of the documents, with what their prompts put around each.
        sources: memory, host, storage, peer or computed -> tokens of documents; empty where the server does not say.
        failures: documents that were refused or are not found, by their lines.
    """

    documents: int = 0
    tokens: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of `starling warm`."""
    parser = argparse.ArgumentParser(
        prog="starling warm",
        description="Has a server compute documents, so that they are in its library (serve --star-library), and "
        "checks that other prompts find them.",
        epilog="With MODEL, all other options are those of `starling serve`, --star-library among them, and MODEL "
        "comes before them. What the library has is found, not computed: the same command goes on after an "
        "interruption. Exit code: 0 done, 1 a document was refused or is not found, or the server failed, 2 unusable "
        "arguments, 130 interrupted. See docs/library.md.",
        allow_abbrev=False,
    )
    add_server_options(parser)
    add = parser.add_argument
    add("--documents", type=Path, required=True, metavar="FILE", help=f"JSONL, a document in each line: {LINE}")
    add(
        "--head",
        type=Path,
        metavar="FILE",
        help="what is before the documents in every prompt, to the last character; of chats the system message, or a "
        "message as JSON",
    )
    add(
        "--segments",
        metavar="HOW",
        help=f"how your requests have their documents: {FORMS}. Default: the server's --star-segments",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Compute the documents; returns the exit code."""
    args, serve_options = make_parser().parse_known_args(argv)
    console = make_console()

    def warmed() -> int:
        options = list(serve_options)
        check_arguments(args, options)
        head, documents = read_head(args.head), read_documents(args.documents)
        with contextlib.ExitStack() as stack:
            if args.serve is not None:
                options += [] if SAYS_CACHED in options else [SAYS_CACHED]
                log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / LOG_FILE
                with console.status(f"starting starling serve {escape(args.serve)}"):
                    args.base_url = stack.enter_context(served(args.serve, options, log))
            done = asyncio.run(warm(args, head, documents, console))
        show(done, console)
        return FAILED if done.failures else 0

    return run_command("starling warm", warmed, lambda: "The same command goes on from there.")


def read_head(path: Path | None) -> Message | None:
    """Return the message of a head, or None if there is none (raises ValueError: it can't be read)."""
    try:
        text = "" if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"head={str(path)!r} can't be read: {error}") from None
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if is_message(given := json.loads(text)):
            return dict(given)
    return message("system", text)


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def read_documents(path: Path) -> list[tuple[int, Message]]:
    """Return (line, message) of each document, equal ones once (raises ValueError: a line has no text)."""
    found: dict[str, tuple[int, Message]] = {}
    for number, value in read_json_lines(path, "documents", LINE):
        document = document_of(value, f"{path}, line {number}")
        found.setdefault(json.dumps(document, sort_keys=True), (number, document))
    return list(found.values())


def document_of(value: Any, where: str) -> Message:
    """Return the message of a document, from the value of its line."""
    if is_message(value):
        return dict(value)
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: there is no text. Allowed: {LINE}.")
    return message("user", text)


@dataclass(frozen=True)
class Prompts:
    """Makes prompts with documents as the requests of a server's users.

    Attributes:
        form: CHAT, TEXTS, or the text of the token that starts each document.
        is_default: True if the server has this form by itself.
    """

    client: Client
    form: str
    is_default: bool
    head: Message | None

    async def request(self, documents: Sequence[Message], question: str) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request (raises ValueError: a document is no text)."""
        star: dict[str, Any] = {"star": "on"} | ({} if self.is_default else {"star_segments": self.form})
        path, body = "/v1/completions", {"temperature": 0, "vllm_xargs": star}
        if self.form == CHAT:
            assert self.head is not None
            messages = [self.head, *documents, message("user", question)]
            return "/v1/chat/completions", body | {"messages": messages}
        head, *texts = map(text_of, ([self.head] if self.head else [message("system", "")]) + [*documents])
        if self.form != TEXTS:
            return path, body | {"prompt": joined_text(self.form, head, texts, question)}
        tokenizer = self.client.tokenizer
        tokens, starts = joined_tokens(
            await tokenizer.tokenize_prompt(head) if head else [],
            [await tokenizer.tokenize(text) for text in texts],
            await tokenizer.tokenize(question),
        )
        return path, body | {"prompt": tokens, "vllm_xargs": star | {"star_segments": starts}}


def text_of(given: Message) -> str:
    """Return the text of a message (raises ValueError: it has parts)."""
    if not isinstance(given["content"], str):
        raise ValueError("a message of parts is no text, and only a chat has such messages")
    return given["content"]


async def prompts_for(client: Client, head: Message | None, form: str | None) -> Prompts:
    """Return the prompts of a server.

    Args:
        form: CHAT, TEXTS, or the text of the token that starts each document; or None for the server's form.

    Raises:
        ServerError: Starling is not activated, the server has no library, or does not say what it has cached.
        ValueError: the server has no form of its own, and none is given; or a chat has no head.
    """
    await client.refuse_without_starling("star_segments")
    server = await client.look_up("/v1/completions", {"prompt": QUESTION, "max_tokens": 1})
    if not server.get("library"):
        raise ServerError(f"{client.base_url}: {NO_LIBRARY}")
    default = server.get("star_segments", "off")
    form = form or default
    if form == "off":
        raise ValueError(f"segments={form!r} is refused: {NO_FORM}. Allowed: {FORMS}.")
    if form == CHAT and head is None:
        raise ValueError(f"head is missing: {NO_HEAD} (--head)")
    return Prompts(client, form, form == default, head)


async def warm(
    args: argparse.Namespace, head: Message | None, documents: Sequence[tuple[int, Message]], console: Console
) -> Warmed:
    """Send a prompt of each document; a document that is refused or not found is noted, and the others go on.

    Raises:
        ServerError: the server failed, or can't have documents in a library.
        ValueError: it is not known how requests have their documents.
    """
    done = Warmed()
    async with connect(args) as client:
        prompts = await prompts_for(client, head, args.segments)
        path, body = await prompts.request([message("user", OTHER_DOCUMENT)], OTHER_QUESTION)
        await client.look_up(path, body | {"max_tokens": 1})  # what each document would be refused for is said once
        waiting = iter(documents)
        with progress_bars(console) as progress:
            bar = progress.add_task("documents", total=len(documents))

            async def work() -> None:
                for line, document in waiting:
                    try:
                        await warm_document(prompts, document, done)
                    except (RequestRefused, ValueError) as error:
                        done.failures.append(f"line {line}: {error}")
                    progress.advance(bar)

            await in_parallel(work, args.concurrency)
        # vLLM begins to store what a step has computed in the next step.
        await client.send("/v1/completions", {"prompt": QUESTION, "max_tokens": 2, "vllm_xargs": {"star": "off"}})
    return done


async def warm_document(prompts: Prompts, document: Message, done: Warmed) -> None:
    """Have one document computed, and look whether another prompt finds it.

    Raises:
        RequestRefused: the server refuses it.
        ServerError: the server failed.
        ValueError: it is not found.
    """
    copies = documents_of(document, prompts.head is not None)
    path, body = await prompts.request(copies, QUESTION)
    plan = await prompts.client.send(path, body | {"max_tokens": 1})
    path, body = await prompts.request([document, message("user", OTHER_DOCUMENT)], OTHER_QUESTION)
    answer = await prompts.client.look_up(path, body | {"max_tokens": 1})
    done.tokens += tokens_found(answer)
    done.documents += 1
    sources = plan.get("document_sources", [])
    for block in sources[: len(sources) // len(copies)]:
        done.sources.update({str(kind): int(tokens) for kind, tokens in block.items()})


def show(done: Warmed, console: Console) -> None:
    """Print what was done."""
    console.print(f"{done.documents} documents, {done.tokens:,} tokens, found by other prompts")
    if done.sources:
        kinds = {"computed": "computed", "memory": "in memory", "host": "in host memory", "storage": "in files"}
        parts = [f"{done.sources[kind]:,} {name}" for kind, name in kinds.items() if done.sources[kind]]
        console.print(", ".join(parts))
    for failure in done.failures[:MAX_SHOWN]:
        console.print(escape(failure), style="red")
    if len(done.failures) > MAX_SHOWN:
        console.print(f"and {len(done.failures) - MAX_SHOWN} more", style="red")
