"""A server with OpenAI's completions API and /tokenize in this process. A token is the code of a character."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from starling.config.head_scores import HeadScores
from starling.config.parsing import OptionError
from starling.lab.evaluation.answers import STAR_NUMBERS
from starling.scheduler.planning.plan import summary
from tests.unit.plans import make_plan

MAX_MODEL_LEN = 100_000
END = 3  # the token that ends each output


@dataclass
class FakeServer:
    """What the server answers, and what it was asked.

    Attributes:
        answer: (prompt, vllm_xargs) -> output.
        starling: whether responses have `x-starling-plan`.
        engages: whether star plans engage.
        tokenizes, templated: whether the server has /tokenize, and a chat template.
        chat_tokens: (status, message) of /tokenize for chats, where it takes none.
        models: names.
        fail: called before each completion; what it returns is sent: (status, message), or (status, message, headers).
        replies: path -> what the server answers there, in place of the right answer; bytes as they are.
        plan_header: sent in place of the plan.
        headers: sent with each response.
        raw_logprobs: whether log-probabilities are those before restrictions.
        page_size: tokens of a page, of which star blocks are whole numbers.
        kv_heads: of the model, whose scores the server has; 0: it has none.
        loss: (prompt, vllm_xargs with the block size in tokens) -> how much less probable star finds each forced token,
            in nats.
        counts: tokens of a prompt -> those that the server counts.
        sources: where the documents of a prompt came from, which plans with documents say; None: they don't.
        library: what a look-up says of the server.
        cached: of each of a document's tokens that are looked up, those that are cached.
    """

    answer: Callable[[str, dict], str] = lambda prompt, xargs: " nothing"
    starling: bool = True
    engages: bool = True
    tokenizes: bool = True
    templated: bool = True
    chat_tokens: tuple[int, str] | None = None
    models: tuple[str, ...] = ("fake",)
    fail: Callable[[dict], tuple | None] = lambda body: None
    replies: dict = field(default_factory=dict)
    plan_header: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    raw_logprobs: bool = True
    page_size: int = 1
    kv_heads: int = 0
    loss: Callable[[str, dict], float] = lambda prompt, xargs: 0.5
    counts: Callable[[int], int] = lambda num_tokens: num_tokens
    sources: list[dict[str, int]] | None = None
    library: dict = field(default_factory=lambda: {"library": True, "star_segments": "texts"})
    cached: Callable[[int], int] = lambda tokens: tokens
    url: str = ""
    keys: list[str | None] = field(default_factory=list)
    completions: list[dict] = field(default_factory=list)
    looked_up: list[dict] = field(default_factory=list)

    def reply(self, path: str, body: dict) -> tuple[int, dict, dict[str, str]]:
        if path in self.replies:
            return 200, self.replies[path], {}
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.models]}, {}
        if path == "/version":
            return 200, {"version": "0.0"}, {}
        if path == "/tokenize" and self.tokenizes:
            if "messages" in body and not self.templated:
                return 400, {"error": {"message": "there is no chat template"}}, {}
            if "messages" in body and self.chat_tokens:
                return self.chat_tokens[0], {"message": self.chat_tokens[1]}, {}
            text = body.get("prompt") or "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + "<answer>"
            return 200, {"tokens": [ord(character) for character in text], "max_model_len": MAX_MODEL_LEN}, {}
        if path == "/v1/completions":
            failure = self.fail(body)
            if failure is not None:
                return failure[0], {"error": {"message": failure[1]}}, dict(*failure[2:])
            return self.complete(body)
        if path == "/v1/chat/completions":
            self.completions.append(body)
            plan = {"attention": "star", "document_sources": self.sources or []}
            return 200, {}, {"x-starling-plan": json.dumps(plan)}
        if path.startswith("/starling/cached/"):
            self.looked_up.append(body)
            blocks = [{"tokens": tokens, "cached_tokens": self.cached(tokens)} for tokens in (10, 2)]
            return 200, {"plan": {"why": "a reason"}, "replicas": [{"documents": blocks}]} | self.library, {}
        return 404, {"detail": "Not Found"}, {}

    def complete(self, body: dict) -> tuple[int, dict, dict[str, str]]:
        self.completions.append(body)
        tokens, xargs = body["prompt"], {"star": "off"} | body.get("vllm_xargs", {})
        tokens = list(map(ord, tokens)) if isinstance(tokens, str) else tokens
        try:
            made = self.plan(len(tokens), xargs)
        except OptionError as error:
            return 400, {"error": {"message": str(error)}}, {}
        headers = {"x-starling-plan": self.plan_header or json.dumps(made)} if self.starling else {}
        choice: dict = {"finish_reason": "stop"}
        if "allowed_token_ids" in body:
            [forced] = body["allowed_token_ids"]
            sized = xargs | {"star_block_size": made.get("block_size")}
            shift = 0.0 if xargs["star"] == "off" else self.loss("".join(map(chr, tokens)), sized)
            other = -0.7 if self.raw_logprobs else -9999.0
            top = {f"token_id:{forced}": -0.7 - shift, "token_id:1": other, "token_id:2": -5.0 if shift else other - 4}
            choice |= {"text": chr(forced), "token_ids": [forced]}
            choice["logprobs"] = {"token_logprobs": [-0.7 - shift], "top_logprobs": [top]}
        else:
            text = self.answer("".join(map(chr, tokens)), xargs)[: body["max_tokens"]]
            choice |= {"text": text, "token_ids": [*map(ord, text), END]}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": self.counts(len(tokens))}}, headers

    def plan(self, num_tokens: int, xargs: dict) -> dict:
        """The plan that Starling would make, with documents by its numbers only."""
        if "star_segments" in xargs or (self.library["star_segments"] == "<sep>" and xargs["star"] == "on"):
            shown = {"attention": "star", **dict.fromkeys(STAR_NUMBERS, 1)}
            return shown if self.sources is None else shown | {"document_sources": self.sources}
        plan = None
        if self.engages:
            scores = HeadScores(scores=[[0.0] * self.kv_heads]) if self.kv_heads else None
            plan = make_plan(num_tokens, {}, xargs, self.page_size, find_heads=lambda: scores)
        if plan is None:
            return {"attention": "dense", "prompt_tokens": num_tokens}
        return summary(plan)


class Listening(ThreadingHTTPServer):
    # Python's default of 5 makes the kernel drop connections of a burst. The clients' kernel tries again after 1, 3,
    # 7, ... seconds.
    request_queue_size = 1024


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on loopback whose requests a handler answers, without its log, until the block ends."""

    class Quiet(handler):
        def log_message(self, *args: object) -> None:
            pass

    http = Listening(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@contextmanager
def served(**settings) -> Iterator[FakeServer]:
    """A running server; ``settings`` are fields of FakeServer."""
    fake = FakeServer(**settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fake.keys.append(self.headers.get("authorization"))
            length = int(self.headers.get("content-length", 0))
            status, answer, headers = fake.reply(self.path, json.loads(self.rfile.read(length) or "{}"))
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in (headers | fake.headers | {"content-length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

    with listening(Handler) as fake.url:
        yield fake
