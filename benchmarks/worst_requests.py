"""How long one request holds the event loop that serves all clients: the worst of each field, over both fronts.

The CPU time of the API server's thread from before a request to after its answer, so that what else the machine does
does not count. Each request is as large as its field may be, or larger than any bound. The first request of each kind
is left out, in which Python loads modules.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx

from benchmarks.random_llama import make_tiny_llama
from benchmarks.report import saved_figure, write_json
from examples.server import Server, serving
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc

REPEATS = 3
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MIB = 2**20
OPTIONS = ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]


def body(number: int, element: str, around: str) -> bytes:
    """A JSON body in which ``around`` has so many elements in place of %s; in these # is the index."""
    elements = ",".join(element.replace("#", str(index)) for index in range(number))
    return ('{"model": "tiny", "max_tokens": 1, ' + around % elements + "}").encode()


PROMPT = '"prompt": "abc", '


def http_requests() -> dict[str, Callable[[], tuple[str, bytes]]]:
    """Name -> what makes path and body, some of which are large."""
    return {
        "text, 8 MiB": lambda: (COMPLETIONS, body(700_000, "hello world", '"prompt": "%s"')),
        "image, 31 MiB": lambda: (COMPLETIONS, body(1, "A" * 31 * MIB, PROMPT + '"user": "%s"')),
        "token ids, at the bound": lambda: (COMPLETIONS, body(2**18, "77", '"prompt": [%s]')),
        "token ids, 8 MiB": lambda: (COMPLETIONS, body(2_800_000, "77", '"prompt": [%s]')),
        "empty prompts, 8 MiB": lambda: (COMPLETIONS, body(2_800_000, "[]", '"prompt": [%s]')),
        "messages, at the bound": lambda: (CHATS, body(5_400, '{"role": "user", "content": "a"}', '"messages": [%s]')),
        "empty messages, at the bound": lambda: (CHATS, body(16_000, "{}", '"messages": [%s]')),
        "empty messages, 1 MiB": lambda: (CHATS, body(349_000, "{}", '"messages": [%s]')),
        "parts, at the bound": lambda: (
            CHATS,
            body(5_400, '{"type": "text"}', '"messages": [{"role": "user", "content": [%s]}]'),
        ),
        "logit_bias, at the bound": lambda: (COMPLETIONS, body(16_300, '"#": 1', PROMPT + '"logit_bias": {%s}')),
        "logit_bias, 8 MiB": lambda: (COMPLETIONS, body(700_000, '"#": 1', PROMPT + '"logit_bias": {%s}')),
        "stop, 8 MiB": lambda: (COMPLETIONS, body(2_000_000, '"a"', PROMPT + '"stop": [%s]')),
        "offsets, at the bound": lambda: (
            COMPLETIONS,
            body(16_300, "7", PROMPT + '"vllm_xargs": {"star_segments": [%s]}'),
        ),
        "options, 4 MiB of \\u0001": lambda: (
            COMPLETIONS,
            body(1, "\\u0001" * 700_000, PROMPT + '"vllm_xargs": {"star": "%s"}'),
        ),
        "unknown fields, at the bound": lambda: (COMPLETIONS, body(16_300, '"a#": 1', PROMPT + "%s")),
        "choices, at the bound": lambda: (
            COMPLETIONS,
            body(1024, '"choice #"', PROMPT + '"structured_outputs": {"choice": [%s]}'),
        ),
        "choices, 500,000": lambda: (
            COMPLETIONS,
            body(500_000, '"choice"', PROMPT + '"structured_outputs": {"choice": [%s]}'),
        ),
        "n = 16,384": lambda: (COMPLETIONS, body(1, "16384", PROMPT + '"n": %s')),
        "deep": lambda: (COMPLETIONS, body(1, "[" * 900_000 + "]" * 900_000, PROMPT + '"user": %s')),
    }


def sampling(**fields: Any) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(text="abc", sampling=pb.SamplingParams(max_tokens=1, **fields))


def grpc_requests() -> dict[str, Callable[[], pb.GenerateStreamRequest]]:
    one = pb.SamplingParams(max_tokens=1)
    return {
        "text, 8 MiB": lambda: pb.GenerateStreamRequest(text="hello, " * 1_150_000, sampling=one),
        "token ids, 8 MiB": lambda: pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=[77] * 8_300_000), sampling=one),
        "texts, at the bound": lambda: pb.GenerateStreamRequest(texts=pb.Texts(texts=["a"] * 32_000), sampling=one),
        "texts, 8 MiB": lambda: pb.GenerateStreamRequest(texts=pb.Texts(texts=[""] * 4_100_000), sampling=one),
        "messages, at the bound": lambda: pb.GenerateStreamRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * 10_000), sampling=one
        ),
        "stop, 8 MiB": lambda: sampling(stop=[""] * 4_100_000),
        "bad_words, 8 MiB": lambda: sampling(bad_words=[""] * 2_700_000),
        "logit_bias, at the bound": lambda: sampling(logit_bias=dict.fromkeys(range(16_000), 1.0)),
        "logit_bias, 8 MiB": lambda: sampling(logit_bias=dict.fromkeys(range(500_000), 1.0)),
        "extra_args, deep": lambda: sampling(extra_args="[" * 32_000 + "]" * 32_000),
        "extra_args, 8 MiB": lambda: sampling(extra_args=json.dumps({"a": [7] * 2_700_000})),
        "offsets, 8 MiB": lambda: pb.GenerateStreamRequest(
            text="abc", sampling=one, star=pb.StarOptions(segment_offsets=range(2_500_000))
        ),
        "lora_name, 8 MiB": lambda: pb.GenerateStreamRequest(text="abc", sampling=one, lora_name="x" * 8_000_000),
        "n = 16,384": lambda: sampling(n=16_384),
    }


def cpu_seconds(server: Server) -> float:
    """CPU time of the thread that runs the event loop: the process's first."""
    pid = server.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def over_http(http: httpx.Client, given: tuple[str, bytes]) -> str:
    path, content = given
    return str(http.post(path, content=content, headers={"content-type": "application/json"}).status_code)


def over_grpc(stub: inference_pb2_grpc.InferenceServiceStub, request: pb.GenerateStreamRequest) -> str:
    try:
        for _ in stub.GenerateStream(request, timeout=300):
            pass
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def measured(
    server: Server, front: str, send: Callable[[Any], str], requests: Mapping[str, Callable[[], Any]], repeats: int
) -> list[dict[str, Any]]:
    """A row for each request: the least of ``repeats`` CPU times, since the loop does other things meanwhile."""
    rows = []
    for name, make in requests.items():
        request, times = make(), []
        answer = send(request)
        for _ in range(repeats):
            before = cpu_seconds(server)
            send(request)
            times.append(cpu_seconds(server) - before)
        rows.append({"front": front, "request": name, "answer": answer, "cpu_seconds": round(min(times), 4)})
        print(rows[-1], flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    ordered = sorted(rows, key=lambda row: row["cpu_seconds"])
    with saved_figure(path, figsize=(8, 0.24 * len(rows) + 1)) as (_, axes):
        names = [f"{row['front']}: {row['request']} ({row['answer']})" for row in ordered]
        colours = ["#4269d0" if row["front"] == "HTTP" else "#efb118" for row in ordered]
        axes.barh(names, [row["cpu_seconds"] for row in ordered], color=colours)
        axes.axvline(0.1, color="black", linewidth=0.8)
        axes.set_xlabel("CPU seconds of the event loop's thread for one request (line: 0.1)")
        axes.tick_params(labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long the worst requests hold a server's event loop.")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="times that each is sent (default: %(default)s)")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "tiny")
        with serving(model, *OPTIONS, log=Path(folder) / "log") as server:
            with httpx.Client(base_url=server.http, timeout=300) as http:
                rows = measured(server, "HTTP", partial(over_http, http), http_requests(), repeats)
            with grpc.insecure_channel(server.grpc, [("grpc.max_send_message_length", -1)]) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                rows += measured(server, "gRPC", partial(over_grpc, stub), grpc_requests(), repeats)
    plot(rows, write_json("worst_requests", {"requests": rows}).with_suffix(".png"))


if __name__ == "__main__":
    main()
