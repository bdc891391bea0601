"""Questions about eight documents, dense and with cached documents; then a long prompt, dense and with star blocks.

Serves the demo model (`make demo-model`) with an adapter for documents, streams the answers over the OpenAI API and
over gRPC, and compares the times to their first tokens.

    python examples/demo.py
"""

import argparse
import contextlib
import importlib
import pydoc
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from server import Server, end_on_signals, serving

from starling.client import Client

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
ADAPTER = ROOT / "examples" / "checkpoints" / "adapter-smollm2-135m-instruct"
LOG = ROOT / "build" / "demo-server.log"

MODULES = ("colorsys", "glob", "textwrap", "heapq", "getpass", "fnmatch", "bisect", "queue")
CHARACTERS = 2200  # of a document: about 500 tokens
HEAD = "You answer questions about documents. Answer in one short sentence, with words of the documents."
FIRST, OTHER = "What does getpass.getuser return?", "What does glob.escape do?"
EDIT = "\nThis version of the document has one sentence more."
STAR_BLOCK_SIZE = 1024
DENSE, DOCUMENTS, STAR = "dense attention", "documents", "star blocks"
OPTIONS = {
    DENSE: {"star": "off"},
    DOCUMENTS: {"star": "on"},
    STAR: {"star": "on", "star_segments": "off", "star_block_size": STAR_BLOCK_SIZE},
}
# An answer ends where its first sentence does: a model of this size has no more to say.
SAMPLING = {"temperature": 0, "max_tokens": 48, "stop": [". ", ".\n", "\n"]}

console = Console(highlight=False)
Message = dict[str, str]


def document(module: str) -> str:
    """Return the documentation of a module as pydoc renders it, without the file's path."""
    text = pydoc.render_doc(importlib.import_module(module), renderer=pydoc.plaintext)
    return re.sub(".\b", "", text).split("\nFILE\n")[0][:CHARACTERS]


def chat(documents: list[str], question: str) -> list[Message]:
    """Return a chat of a head, documents and a question; with the preset rag, each later message is a document."""
    contents = [*documents, question]
    return [{"role": "system", "content": HEAD}, *({"role": "user", "content": text} for text in contents)]


def over_http(server: Server, messages: list[Message], options: dict[str, object]) -> Iterator[str]:
    """Yield the texts of an answer of /v1/chat/completions."""
    stream = OpenAI(base_url=f"{server.http}/v1", api_key="none").chat.completions.create(
        model=MODEL.name, messages=messages, stream=True, extra_body={"vllm_xargs": options}, **SAMPLING
    )
    for chunk in stream:
        yield chunk.choices[0].delta.content or ""


def over_grpc(server: Server, messages: list[Message], options: dict[str, object]) -> Iterator[str]:
    """Yield the texts of an answer of starling.v1, of whose prompt nothing is cached."""
    with Client(server.grpc) as client:
        for event in client.stream(messages=messages, cache_salt=uuid.uuid4().hex, **options, **SAMPLING):
            yield getattr(event, "text", "")


@dataclass
class Answered:
    """One answer: what it was asked with, and the seconds to its first token."""

    step: str
    way: str
    seconds: float


def stream_answer(step: str, way: str, texts: Iterator[str]) -> Answered:
    """Stream one answer to the terminal."""
    start, seconds = time.perf_counter(), None
    with console.status(f"{way}: reading the prompt") as status:
        for text in texts:
            if text and seconds is None:
                seconds = time.perf_counter() - start
                status.stop()
                console.print(f"  {way}, after {seconds:.2f} s: ", end="")
            console.print(text, end="", markup=False)
    console.print()
    return Answered(step, way, time.perf_counter() - start if seconds is None else seconds)


def picture(answers: list[Answered]) -> Table:
    """Return a bar with the seconds to the first token of each answer, all of the same scale."""
    table = Table("", "", "time to the first token", "", box=None)
    longest = max(answer.seconds for answer in answers)
    before = ""
    for answer in answers:
        bar = Bar(longest, 0, answer.seconds, width=40, color="white" if answer.way == DENSE else "blue")
        table.add_row("" if answer.step == before else answer.step, answer.way, bar, f"{answer.seconds:.2f} s")
        before = answer.step
    return table


def ask_all(server: Server) -> Iterator[Answered]:
    """Ask all questions, each dense first."""
    documents = [document(module) for module in MODULES]
    edited = [documents[0], documents[1] + EDIT, *documents[2:]]
    others = [*reversed(documents)]
    steps: list[tuple[str, str, list[str]]] = [
        ("eight documents, for the first time", FIRST, documents),
        ("in another order, another question", OTHER, others),
        ("one document edited", FIRST, edited),
    ]
    for step, question, given in steps:
        console.print(f"\n[bold]{step}[/bold]: {question}")
        for way in (DENSE, DOCUMENTS):
            yield stream_answer(step, way, over_http(server, chat(given, question), OPTIONS[way]))
    step = "one long text, over gRPC"
    console.print(f"\n[bold]{step}[/bold], nothing cached: {FIRST}")
    for way in (DENSE, STAR):
        messages = [{"role": "user", "content": "\n\n".join([*documents, FIRST])}]
        yield stream_answer(step, way, over_grpc(server, messages, OPTIONS[way]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    end_on_signals()
    command = f"starling serve {MODEL.name} --preset rag --star-adapter {ADAPTER.name}"
    console.print(f"starting [bold]{command}[/bold], log in {LOG.relative_to(ROOT)}")
    with contextlib.ExitStack() as stack:
        with console.status("starting") as status:
            options = ["--served-model-name", MODEL.name, "--preset", "rag", "--star-adapter", str(ADAPTER)]
            options += ["--enforce-eager", "--dtype", "bfloat16"]
            server = stack.enter_context(
                serving(MODEL, *options, log=LOG, on_message=lambda line: status.update(f"starting: {line:.80}"))
            )
        for _ in over_http(server, [{"role": "user", "content": "Hello!"}], OPTIONS[DENSE]):
            pass  # the first request of a server takes longer
        console.print(f"documents: pydoc of {', '.join(MODULES)}, about 500 tokens each")
        answers = list(ask_all(server))
    console.print()
    console.print(picture(answers))
    console.print(
        "\nDocuments are computed once, alone, and used wherever they stand. That costs answers, most of all with a "
        "small model:\ndocs/adapter.md says how many, and what the adapter brings back. `starling advise` measures it "
        "on your prompts."
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
