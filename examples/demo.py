"""Ask a question about a long text with dense attention and with Star Attention, over the OpenAI API and over gRPC.

Serves the demo model (`make demo-model`), streams the four answers, and compares their times to first token.

    python examples/demo.py
"""

import argparse
import contextlib
import importlib
import json
import pydoc
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from openai import OpenAI
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from server import Server, end_on_signals, serving

from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
LOG = ROOT / "build" / "demo-server.log"

MODULES = ("colorsys", "glob", "textwrap", "heapq", "getpass", "fnmatch", "bisect")  # about 6,000 tokens
QUESTION = "According to its documentation, what does getpass.getuser return?"
MAX_TOKENS = 24
STAR_BLOCK_SIZE = 1024

console = Console(highlight=False)


def document() -> str:
    """The documentation of MODULES as pydoc renders it, without the file paths."""
    texts = (pydoc.render_doc(importlib.import_module(name), renderer=pydoc.plaintext) for name in MODULES)
    return "\n\n".join(text.split("\nFILE\n")[0] for text in texts)


def over_http(server: Server, messages: list[dict[str, str]], star: bool, on_text: Callable[[str], None]) -> Any:
    """Stream an answer from /v1/chat/completions to ``on_text``; returns the plan from the response header."""
    client = OpenAI(base_url=f"{server.http}/v1", api_key="none")
    options = {"star": "on", "star_block_size": STAR_BLOCK_SIZE} if star else {}
    response = client.chat.completions.with_raw_response.create(
        model=MODEL.name,
        messages=messages,
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        extra_body={"vllm_xargs": options, "cache_salt": uuid.uuid4().hex},
    )
    for chunk in response.parse():
        on_text(chunk.choices[0].delta.content or "")
    return json.loads(response.headers["x-starling-plan"])


def over_grpc(server: Server, messages: list[dict[str, str]], star: bool, on_text: Callable[[str], None]) -> Any:
    """Stream an answer to the same tokens from GenerateStream to ``on_text``; returns the plan of the last event."""
    chat = {"model": MODEL.name, "messages": messages, "add_generation_prompt": True}
    tokens = httpx.post(f"{server.http}/tokenize", json=chat, timeout=60).raise_for_status().json()["tokens"]
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=tokens),
        sampling=pb.SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        cache_salt=uuid.uuid4().hex,
    )
    if star:
        request.star.CopyFrom(pb.StarOptions(mode=pb.StarOptions.MODE_ON, block_size=str(STAR_BLOCK_SIZE)))
    with grpc.insecure_channel(server.grpc) as channel:
        for event in inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(request):
            on_text(event.delta.text)
    plan = event.final.plan
    names = ("prompt_tokens", "keys_per_context_token")
    attention = "star" if plan.attention == pb.Plan.ATTENTION_STAR else "dense"
    return {"attention": attention} | {name: getattr(plan, name) for name in names}


@dataclass
class Answered:
    """One answer: what asked for it, the seconds to its first token, and the keys that a token of the text saw."""

    name: str
    seconds: float
    keys: float


def stream_answer(name: str, stream: Callable[..., Any], *arguments: Any) -> Answered:
    """Stream one answer to the terminal."""
    console.print(f"\n[bold]{name}[/bold]")
    start, first_token = time.perf_counter(), None
    with console.status("prefilling") as status:

        def print_text(text: str) -> None:
            nonlocal first_token
            if text and first_token is None:
                first_token = time.perf_counter() - start
                status.stop()
            console.print(text, end="", markup=False)

        plan = stream(*arguments, print_text)
    console.print()
    keys = (plan["prompt_tokens"] + 1) / 2 if plan["attention"] == "dense" else plan["keys_per_context_token"]
    return Answered(name, first_token or time.perf_counter() - start, keys)


def picture(answers: list[Answered]) -> Table:
    """A bar with the seconds to the first token of each answer."""
    table = Table("", "time to the first token", "", "tokens seen by each", box=None)
    longest = max(answer.seconds for answer in answers)
    for answer in answers:
        bar = Bar(longest, 0, answer.seconds, width=40, color="blue" if "star" in answer.name else "white")
        table.add_row(answer.name, bar, f"{answer.seconds:.1f} s", f"{answer.keys:,.0f}")
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    end_on_signals()
    text = document()
    messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    console.print(f"starting [bold]starling serve {MODEL.name}[/bold], log in {LOG.relative_to(ROOT)}")
    with contextlib.ExitStack() as stack:
        with console.status("starting") as status:
            options = ("--served-model-name", MODEL.name, "--enforce-eager", "--dtype", "bfloat16")
            server = stack.enter_context(
                serving(MODEL, *options, log=LOG, on_message=lambda line: status.update(f"starting: {line:.80}"))
            )
        over_http(server, [{"role": "user", "content": "Hello!"}], False, lambda text: None)  # warm up
        console.print(f"document: pydoc of {', '.join(MODULES)}; {len(text):,} characters")
        console.print(f"question: {QUESTION}")
        answers = [
            stream_answer(f"{front}, {'star' if star else 'dense'}", stream, server, messages, star)
            for front, stream in (("OpenAI API", over_http), ("gRPC", over_grpc))
            for star in (False, True)
        ]
    console.print("\nThe same question, four times; nothing is cached between them.\n")
    console.print(picture(answers))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
