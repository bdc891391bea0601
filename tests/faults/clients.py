"""Four clients of one server: HTTP and gRPC, streamed and not. Each sends one request and says how it ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc

ANSWER = "answer"
"""The whole output, which `check.wrong_answers` also looks at."""
ERROR = "error"
"""A status, or an error event in a stream."""
ABORTED = "aborted"
"""Some of the output, with "abort" as its finish reason. vLLM's HTTP stream without a token leaves the reason out."""
CLOSED = "closed"
"""The connection ended or was refused without a status. gRPC's library makes an UNAVAILABLE of it, an ERROR."""
SILENCE = "silence"
"""No end within the deadline."""
SHORT = "short"
"""A response without an error that has fewer tokens than requested."""
WRONG = "wrong"
"""The whole output, with other tokens than the model's."""


@dataclass(frozen=True)
class Request:
    """A greedy request for exactly ``max_tokens`` tokens.

    Attributes:
        star: options under the names of `vllm_xargs`; empty: dense.
    """

    model: str
    prompt: list[int]
    max_tokens: int
    star: dict[str, Any] = field(default_factory=dict)

    def http(self, stream: bool) -> dict[str, Any]:
        greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": self.max_tokens, "return_token_ids": True}
        return {"model": self.model, "prompt": self.prompt, "stream": stream, "vllm_xargs": self.star} | greedy

    def grpc(self) -> dict[str, Any]:
        star = {key.removeprefix("star_"): value for key, value in self.star.items() if key != "star"}
        if "block_size" in star:
            star["block_size"] = str(star["block_size"])
        if "shards" in star:
            star["shards"] = star["shards"] == "on"
        mode = pb.StarOptions.MODE_ON if self.star else pb.StarOptions.MODE_OFF
        sampling = pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=self.max_tokens)
        ids = pb.TokenIds(ids=self.prompt)
        return {"token_ids": ids, "sampling": sampling, "star": pb.StarOptions(mode=mode, **star)}


@dataclass
class Outcome:
    """How a request ended.

    Attributes:
        kind: one of the constants above.
        status: of HTTP or gRPC, as text.
        tokens: the output so far; grows while a response is streamed.
        finish_reason: as vLLM names it.
        ended: time.monotonic() at the end.
    """

    kind: str = SILENCE
    status: str = ""
    message: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    ended: float = 0.0


def http_unary(http: httpx.Client, _: grpc.Channel, request: Request, outcome: Outcome) -> None:
    response = http.post("/v1/completions", json=request.http(stream=False))
    outcome.status = str(response.status_code)
    if response.status_code != 200:
        outcome.kind, outcome.message = ERROR, response.text
        return
    (choice,) = response.json()["choices"]
    outcome.tokens += choice["token_ids"]
    outcome.kind, outcome.finish_reason = ANSWER, choice["finish_reason"]


def http_stream(http: httpx.Client, _: grpc.Channel, request: Request, outcome: Outcome) -> None:
    with http.stream("POST", "/v1/completions", json=request.http(stream=True)) as response:
        outcome.status = str(response.status_code)
        if response.status_code != 200:
            outcome.kind, outcome.message = ERROR, response.read().decode()
            return
        outcome.kind = CLOSED  # a stream that ends without `[DONE]`
        for line in lines(response):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                outcome.kind = outcome.kind if outcome.kind == ERROR else ANSWER
            elif line.startswith("data: "):
                event = json.loads(data)
                if "error" in event:
                    outcome.kind, outcome.message = ERROR, event["error"]["message"]
                    outcome.status = f"200, event {event['error'].get('code')}"
                else:
                    (choice,) = event["choices"]
                    outcome.tokens += choice["token_ids"] or []
                    outcome.finish_reason = choice["finish_reason"]


def lines(response: httpx.Response) -> Iterator[str]:
    """The lines of a streamed response. Those of httpx also end at separators of Unicode, which a token may be."""
    rest = b""
    for part in response.iter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        yield from (line.decode() for line in whole)


def grpc_unary(_: httpx.Client, channel: grpc.Channel, request: Request, outcome: Outcome, seconds: float) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    response = stub.Generate(pb.GenerateRequest(**request.grpc()), timeout=seconds)
    outcome.tokens += response.choices[0].token_ids
    outcome.finish_reason = finish_reason(response.choices[0].finish_reason)
    outcome.kind, outcome.status = ANSWER, "OK"


def grpc_stream(_: httpx.Client, channel: grpc.Channel, request: Request, outcome: Outcome, seconds: float) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for event in stub.GenerateStream(pb.GenerateStreamRequest(**request.grpc()), timeout=seconds):
        outcome.tokens += event.delta.token_ids
        if event.HasField("final"):
            outcome.finish_reason = finish_reason(event.final.finish_reason)
    outcome.kind, outcome.status = ANSWER, "OK"


def finish_reason(value: int) -> str:
    return pb.Final.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()


CLIENTS: dict[str, Callable[..., None]] = {
    "HTTP": http_unary,
    "HTTP stream": http_stream,
    "gRPC": grpc_unary,
    "gRPC stream": grpc_stream,
}


class Running:
    """A request of one client in a thread of its own.

    Args:
        seconds: after which the client gives up.
    """

    def __init__(self, client: str, http: Callable[..., httpx.Client], address: str, request: Request, seconds: float):
        self.client, self.request, self.outcome = client, request, Outcome()
        self.http, self.address, self.seconds = http, address, seconds
        self.thread = threading.Thread(target=self._run, name=client, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        outcome, more = self.outcome, {"seconds": self.seconds} if self.client.startswith("gRPC") else {}
        try:
            with self.http(timeout=self.seconds) as http, grpc.insecure_channel(self.address, NO_SHARING) as channel:
                CLIENTS[self.client](http, channel, self.request, outcome, **more)
        except httpx.TimeoutException:
            outcome.kind = SILENCE
        except httpx.TransportError as error:
            outcome.kind, outcome.message = CLOSED, repr(error)
        except grpc.RpcError as error:
            gave_up = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            outcome.kind, outcome.status = SILENCE if gave_up else ERROR, error.code().name
            outcome.message = error.details() or ""
        if outcome.kind == ANSWER and len(outcome.tokens) != self.request.max_tokens:
            is_aborted = outcome.finish_reason == "abort" or not (outcome.tokens or outcome.finish_reason)
            outcome.kind = ABORTED if is_aborted else SHORT
        outcome.ended = time.monotonic()

    @property
    def ended(self) -> bool:
        return not self.thread.is_alive()


NO_SHARING = (("grpc.use_local_subchannel_pool", 1),)
"""Each client has a connection of its own, as clients in different processes have."""


def wrong_answers(http: httpx.Client, running: list[Running]) -> list[Running]:
    """Those whose output is not that of the model for their prompt, greedily.

    The server computes each output again as a part of a prompt, undisturbed. Each token has to be the likeliest after
    those before it. In float32 the rows of a batch change one another's last bits, hence the tolerance.
    """
    wrong = []
    for each in running:
        prompt, tokens, star = each.request.prompt, each.outcome.tokens, dict(each.request.star)
        if star:
            star |= {"star_query_tokens": star["star_query_tokens"] + len(tokens), "star_replicas": 1}
            star |= {"star_shards": "off"}
        body = {"model": each.request.model, "prompt": prompt + tokens, "max_tokens": 1, "prompt_logprobs": 1}
        response = http.post("/v1/completions", json=body | {"vllm_xargs": star, "temperature": 0}, timeout=300)
        response.raise_for_status()
        positions = response.json()["choices"][0]["prompt_logprobs"][len(prompt) :]
        gaps = [
            max(entry["logprob"] for entry in position.values()) - position[str(token)]["logprob"]
            for position, token in zip(positions, tokens, strict=True)
        ]
        if max(gaps) > TOLERANCE:
            each.outcome.message = f"token {gaps.index(max(gaps))} of {len(tokens)} is {max(gaps):.3g} below the best"
            wrong.append(each)
    return wrong


TOLERANCE = 1e-3
