"""Requests to one `starling serve` process over HTTP and gRPC, and what is read from it."""

import re
import subprocess
import sys
from pathlib import Path

import httpx

from starling.v1 import inference_pb2 as pb

PAGE_SIZE = 32
MODEL = "tiny"
PROMPT = "".join(chr(ord("a") + (i * i * 7 + i // 3) % 26) for i in range(701))  # one token for each character
STAR = {"star": "on", "star_block_size": 128, "star_anchor_size": 64, "star_query_tokens": 40}
NUMBERS = {
    "star_blocks": 6,
    "block_size": 128,
    "anchor_size": 64,
    "overlap_size": 0,
    "context_end": 661,
    "prompt_tokens": 701,
}
DENSE_KEYS = 701 * 702 // 2
LONG = pb.SamplingParams(temperature=0, max_tokens=7000, ignore_eos=True)
NO_REUSE = httpx.Limits(max_keepalive_connections=0)
"""The server closes a connection that is idle for some seconds; a request sent at that moment would get a reset."""


def body(path: str, *, stream: bool = False, xargs: dict | None = None, **fields) -> dict:
    """A greedy request for 16 tokens, with the field names of each API."""
    messages = [{"role": "user", "content": PROMPT}]
    of_path = {
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 16},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 16},
        "/v1/responses": {"input": PROMPT, "max_output_tokens": 16},
        "/v1/messages": {"messages": messages, "max_tokens": 16},
    }
    common = {"model": MODEL, "temperature": 0, "stream": stream, "vllm_xargs": xargs or {}}
    return common | of_path[path] | fields


PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]


def request(star: pb.StarOptions | None = None, **fields) -> pb.GenerateStreamRequest:
    sampling = pb.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    return pb.GenerateStreamRequest(**{"text": PROMPT, "sampling": sampling, "star": star} | fields)


def options(xargs: dict) -> pb.StarOptions:
    fields = {key.removeprefix("star_"): value for key, value in xargs.items() if key != "star"}
    if "block_size" in fields:
        fields["block_size"] = str(fields["block_size"])
    return pb.StarOptions(mode=f"MODE_{xargs['star'].upper()}", **fields)


def read(call) -> tuple[str, list[int], pb.Final]:
    *deltas, last = call
    text = "".join(event.delta.text for event in deltas)
    return text, [token for event in deltas for token in event.delta.token_ids], last.final


def metrics(http, name: str) -> float:
    """Sum of a metric's series; 0 if there is none."""
    lines = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, lines))


def running(http) -> float:
    """Number of requests that run in the engine."""
    return metrics(http, "vllm:num_requests_running")


def example(name: str, *arguments: str) -> str:
    """Run a program of examples/; returns its output."""
    script = Path(__file__).resolve().parents[2] / "examples" / name
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
