"""Answers of a server: read within bounds, understood, and checked against the plan that was asked for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from starling.config.parsing import plain, plain_json
from starling.lab.command_line import CommandFailed
from starling.lab.evaluation.prompt_options import Plan
from starling.lab.evaluation.store import TokenScore

MAX_ANSWER_BYTES = 16 * 2**20
"""Bytes of a decompressed answer at most: the tokens of a prompt of two million tokens, 8 bytes each."""
ACCEPTED = "gzip"
CODINGS = ("gzip", "x-gzip", "deflate")
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS  # zlib sees by the first bytes which of the two it is
OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding", "content-type")
MOST_PAUSE = 60.0  # seconds of a server's Retry-After that are obeyed
MAX_MESSAGE = 4096  # characters of an error, which has words of the server's
MAX_SERVER_WORDS = 1024  # characters of them
PLAN_HEADER = "x-starling-plan"
STAR_NUMBERS = (
    "block_size",
    "anchor_size",
    "overlap_size",
    "dense_heads",
    "context_end",
    "prompt_tokens",
    "keys_attended",
    "dense_keys",
)
"""Fields of a star plan in PLAN_HEADER that are used here."""


class ServerError(CommandFailed):
    """The server refused a request, can't be reached, or can't do what the evaluation needs.

    The message has words of the server's. It is plain, and has at most MAX_MESSAGE characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(message[:MAX_MESSAGE]))


class RequestRefused(ServerError):
    """The server refused a request, and would refuse it again."""


class NotEngaged(ServerError):
    """The server prefilled a prompt otherwise than its request asked for."""


@dataclass(frozen=True)
class Completion:
    """One output.

    Attributes:
        text, finish_reason: the values that the server sent.
        token_ids: tokens of the output, or None where the server does not send them.
        plan: the server's ``x-starling-plan``, or None without Starling.
        score: the distribution at the first output position, or None where it was not asked for.
    """

    text: str
    finish_reason: str | None
    token_ids: list[int] | None
    plan: dict[str, Any] | None
    score: TokenScore | None = None


def retry_after(response: httpx.Response) -> float:
    """Return the seconds after which the server wants to be asked again, at most MOST_PAUSE; 0 if it gives none."""
    value = response.headers.get("retry-after", "")
    return min(float(value), MOST_PAUSE) if value.isascii() and value.isdigit() else 0.0


async def read_answer(response: httpx.Response) -> httpx.Response:
    """Read the whole answer of a response that was not read yet, within bounds, whatever the server sends.

    Its text is UTF-8: what the server says about the characters may name any codec of Python, decompressors too.

    Raises:
        ServerError: more than MAX_ANSWER_BYTES, compressed or decompressed, or compressed otherwise than asked for.
        httpx.HTTPError: the connection failed.
    """

    def refused(reason: str) -> ServerError:
        return ServerError(f"{response.url} answers with {reason}")

    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", *CODINGS):
        raise refused(f"content-encoding {coding!r}, which was not asked for. Allowed: {ACCEPTED}")
    decompressor = zlib.decompressobj(ZLIB_OR_GZIP) if coding in CODINGS else None
    body, received = bytearray(), 0
    async for data in response.aiter_raw():
        received += len(data)
        try:
            body += decompressor.decompress(data, MAX_ANSWER_BYTES + 1 - len(body)) if decompressor else data
        except zlib.error as error:
            raise refused(f"compressed data that are damaged: {error}") from None
        if max(received, len(body)) > MAX_ANSWER_BYTES:
            raise refused(f"more than {MAX_ANSWER_BYTES} bytes, the bound MAX_ANSWER_BYTES")
    if decompressor is not None and not decompressor.eof:
        raise refused("compressed data that end too early")
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in OF_THE_BODY]
    return httpx.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)


@contextmanager
def naming(prompt: str) -> Iterator[None]:
    """Put the name of a prompt before the message of a ServerError or ValueError."""
    try:
        yield
    except ServerError as error:
        raise ServerError(f"the prompt {prompt}: {error}") from None
    except ValueError as error:
        raise ValueError(f"the prompt {prompt}: {error}") from None


def answer_json(response: httpx.Response) -> Any:
    """Return the JSON of an answer, each text of which is plain (raises ValueError or RecursionError for another)."""
    return plain_json(response.json())


def optional_count(value: Any) -> int | None:
    """Return a number of tokens, or None (raises ValueError or TypeError for something else)."""
    return None if value is None else int(value)


def as_completion(response: httpx.Response) -> Completion:
    """Return the first choice of a response."""
    with understood(response):
        choice, header = answer_json(response)["choices"][0], response.headers.get(PLAN_HEADER)
        plan = plain_json(json.loads(header)) if header else None
        text, reason, ids = choice["text"], choice.get("finish_reason"), choice.get("token_ids")
        if not isinstance(text, str) or not isinstance(reason, str | None):
            raise TypeError("text and finish_reason are texts")
        return Completion(text, reason, None if ids is None else [int(token) for token in ids], plan)


@contextmanager
def understood(response: httpx.Response, instead: str = "docs/eval.md") -> Iterator[None]:
    """Raise ServerError where a response does not have the form that the block expects.

    Args:
        instead: advice for the user.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        plan = f" ({PLAN_HEADER}: {header[:200]})" if (header := response.headers.get(PLAN_HEADER)) else ""
        raise ServerError(
            f"{response.url} does not answer as vLLM's OpenAI server does ({instead}): {response.text[:200]}{plan}"
        ) from None


def check_engaged(header: str | None, plan: Plan, num_tokens: int) -> None:
    """Refuse an answer that was not prefilled as ``plan`` says.

    Raises:
        NotEngaged: it was not; the message has the reason.
        ValueError, LookupError, TypeError, RecursionError: the header is not one of Starling's.
    """
    found = json.loads(header) if header else {"attention": "nothing"}
    attention = found["attention"]
    if attention != ("dense" if plan.is_dense else "star"):
        raise NotEngaged(
            f"plan={plan.name!r} did not engage on a prompt of {num_tokens} tokens: the server reports {attention} in "
            f"{PLAN_HEADER}. A prompt whose context fits in one star block is dense: use smaller star blocks or longer "
            "prompts."
        )
    if attention == "star":
        _ = [float(found[name]) for name in STAR_NUMBERS]


def check_whole(response: httpx.Response, num_tokens: int) -> None:
    """Refuse (ServerError) an answer whose server counted another number of prompt tokens than it was sent.

    Some servers cut a prompt that is too long for them, or put a token before it.
    """
    with understood(response):
        counted = (answer_json(response).get("usage") or {}).get("prompt_tokens") or num_tokens
    if counted != num_tokens:
        raise ServerError(
            f"{response.url} counted {counted} tokens of a prompt of {num_tokens}: it cuts prompts, or adds tokens"
        )


def error_message(response: httpx.Response) -> str:
    """Return what a server says about an error, up to MAX_SERVER_WORDS characters."""
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return response.text[:MAX_SERVER_WORDS]
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:MAX_SERVER_WORDS]
