"""The client of a server with OpenAI's completions API, and vLLM's /tokenize unless the tokenizer is given."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from starling.config.plain_text import plain, plain_json
from starling.lab.command_line import CommandFailed
from starling.lab.evaluation.plans import Plan
from starling.lab.evaluation.prompts import NO_TEMPLATE, Tokenizer
from starling.lab.evaluation.store import TokenScore

MAX_ANSWER_BYTES = 16 * 2**20
"""Of a decompressed answer. The largest ones are the tokens of a prompt: 8 bytes each, so two million tokens."""
ACCEPTED = "gzip"
CODINGS = ("gzip", "x-gzip", "deflate")
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS  # zlib sees by the first bytes which of the two it is
OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding", "content-type")
CONNECT_SECONDS = 30.0
MOST_PAUSE = 60.0  # seconds of a server's Retry-After that are obeyed
ATTEMPTS = 4
FIRST_PAUSE = 1.0  # seconds before the second attempt; each further pause is twice as long
REPEATED = (408, 425, 429)  # besides 5xx: the same request may succeed later
NO_TOKENIZE = "give the folder of the model's tokenizer with --tokenizer"
NO_CHAT = "chat template"  # in vLLM's words where a model has none
MAX_MESSAGE = 4096  # characters of an error, which has words of the server's
MAX_SERVER_WORDS = 1024  # characters of them
TOP_LOGPROBS = 20  # vLLM's --max-logprobs by default
PLAN_HEADER = "x-starling-plan"
CACHED_PATH = "/starling/cached"
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


def make_http(base_url: str, api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """The connections to a server. Those to this machine go to no proxy, whatever the environment says.

    Raises:
        ValueError: a key that can't be sent; a URL, a proxy or a file with certificates that can't be used.
    """
    refuse_key(api_key or "", "api_key")
    limits = httpx.Limits(max_connections=None)  # --concurrency limits them
    try:
        return httpx.AsyncClient(
            base_url=base_url,
            headers={"accept-encoding": ACCEPTED} | ({"authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=limits,
            # A transport that is given takes the place of the proxies of the environment.
            transport=httpx.AsyncHTTPTransport(limits=limits) if is_this_machine(base_url) else None,
        )
    except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:
        raise ValueError(
            f"base_url={base_url!r} can't be used: {error}. A proxy is that of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, "
            "except for NO_PROXY, and certificates are those of SSL_CERT_FILE or SSL_CERT_DIR"
        ) from None


def is_this_machine(base_url: str) -> bool:
    """Whether a URL names a loopback address."""
    host = httpx.URL(base_url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def refuse_key(key: str, source: str) -> None:
    """Refuse (ValueError) a key that a header can't hold. The message does not show the key.

    Args:
        source: the option or the variable that gave the key.
    """
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"the key of {source} is refused: not all of it is printable ASCII, or it has white space at an end"
        )


def retry_after(response: httpx.Response) -> float:
    """Seconds after which the server wants to be asked again, at most MOST_PAUSE; 0 where it gives no number."""
    value = response.headers.get("retry-after", "")
    return min(float(value), MOST_PAUSE) if value.isascii() and value.isdigit() else 0.0


class ServerError(CommandFailed):
    """The server refused a request, can't be reached, or can't do what the evaluation needs.

    The message has words of the server's. It is plain, and has at most MAX_MESSAGE characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(message[:MAX_MESSAGE]))


class RequestRefused(ServerError):
    """The server refused a request, and would refuse it again."""


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself.

    Attributes:
        model: the name of the model that is asked.
        max_model_len: tokens of a prompt and its output; None where the server does not say.
        starling: whether Starling is activated, so that requests can have star plans.
        version: of vLLM; None where the server does not say.
    """

    model: str
    max_model_len: int | None
    starling: bool
    version: str | None


@dataclass(frozen=True)
class Completion:
    """One output.

    Attributes:
        text, finish_reason: as the server sent them.
        token_ids: of the output; None where the server does not send them.
        plan: the server's ``x-starling-plan``; None without Starling.
        score: the distribution at the first output position; None where it was not asked for.
    """

    text: str
    finish_reason: str | None
    token_ids: list[int] | None
    plan: dict[str, Any] | None
    score: TokenScore | None = None


class Client:
    """A server, as an asynchronous context manager.

    Args:
        base_url: such as http://localhost:8000, with or without /v1.
        model: its name on the server; None: the server has only one.
        api_key: sent as a bearer token.
        timeout: seconds that an answer may take.
        tokenizer: the model's; None: the server's /tokenize.

    Raises:
        ValueError: a key that can't be sent; a URL, a proxy or a file with certificates that can't be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._http = make_http(self.base_url, api_key, timeout)
        self._timeout = timeout
        self._model = model
        self._own_tokenizer = tokenizer
        self._facts: ServerFacts | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def facts(self) -> ServerFacts:
        """What the server says about itself; asked once, with one short completion.

        Raises:
            ServerError: also where the server has no such model, more than one and none is named, or no /tokenize.
        """
        if self._facts is None:
            response = await self._send("GET", "/v1/models")
            with understood(response):
                models = {str(model["id"]): model for model in answer_json(response)["data"]}
                lengths = {name: optional_count(model.get("max_model_len")) for name, model in models.items()}
            names = list(models)
            if not names:
                raise ServerError(f"{self.base_url}/v1/models names no model")
            if self._model is None and len(names) > 1:
                raise ServerError(f"the server has several models: choose one with --model: {', '.join(names)}")
            name = self._model or names[0]
            if name not in names:
                raise ServerError(f"model={name!r} is refused: the server has no such model. Allowed: {names}.")
            if self._own_tokenizer is None:
                tokenized = await self._tokenize({"model": name, "prompt": "Hello"})
                tokens, max_model_len = tokenized["tokens"], tokenized["max_model_len"]
            else:
                tokens, max_model_len = await self._own_tokenizer.tokenize("Hello"), lengths[name]
            probe = {"model": name, "prompt": tokens, "max_tokens": 1}
            starling = PLAN_HEADER in (await self._send("POST", "/v1/completions", probe)).headers
            self._facts = ServerFacts(name, max_model_len, starling, await self._version())
        return self._facts

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes the tokens of prompts."""
        return self if self._own_tokenizer is None else self._own_tokenizer

    async def _version(self) -> str | None:
        try:
            return str(answer_json(await self._send("GET", "/version"))["version"])[:MAX_SERVER_WORDS]
        except (ServerError, ValueError, KeyError, TypeError, RecursionError):
            return None

    async def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return await self._tokens({"prompt": text, "add_special_tokens": False})

    async def tokenize_prompt(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer puts before each prompt."""
        return await self._tokens({"prompt": text})

    async def tokenize_chat(self, messages: Sequence[Any]) -> list[int]:
        """The tokens of a chat with the model's template, up to where the answer begins.

        Raises:
            ServerError: also where the model has no chat template.
        """
        try:
            return await self._tokens({"messages": list(messages), "add_generation_prompt": True})
        except ServerError as error:
            if NO_CHAT not in str(error):
                raise
            raise ServerError(f"{error}\n{NO_TEMPLATE}") from None

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        return list((await self._tokenize({"model": (await self.facts()).model} | body))["tokens"])

    async def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._send("POST", "/tokenize", body, instead=NO_TOKENIZE)
        with understood(response, NO_TOKENIZE):
            answer = answer_json(response)
            tokens = [int(token) for token in answer["tokens"]]
            return {"tokens": tokens, "max_model_len": optional_count(answer["max_model_len"])}

    async def complete(self, token_ids: Sequence[int], plan: Plan, max_tokens: int) -> Completion:
        """The greedy output of a prompt.

        Args:
            token_ids: of the prompt.

        Raises:
            ServerError: also where the plan did not engage.
        """
        response = await self._complete(token_ids, plan, {"max_tokens": max_tokens, "return_token_ids": True})
        return as_completion(response)

    async def seconds_to_first_token(self, token_ids: Sequence[int], plan: Plan) -> float:
        """How long the first token of a prompt takes of which nothing is cached (raises ServerError)."""
        fields = {"max_tokens": 1, "cache_salt": uuid.uuid4().hex}
        started = time.perf_counter()
        await self._complete(token_ids, plan, fields)
        return time.perf_counter() - started

    async def score_token(self, token_ids: Sequence[int], plan: Plan, token_id: int) -> Completion:
        """The log-probabilities at the position behind a prompt, of ``token_id`` and of the most probable tokens.

        The request forces the token as its output. The log-probabilities are those before that restriction, as vLLM
        reports them by default.

        Raises:
            ServerError: also where the server reports them after the restriction.
        """
        fields = {
            "max_tokens": 1,
            "logprobs": TOP_LOGPROBS,
            "allowed_token_ids": [token_id],
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        response = await self._complete(token_ids, plan, fields)
        completion = as_completion(response)
        logprobs = answer_json(response)["choices"][0].get("logprobs")
        if completion.token_ids != [token_id] or not logprobs:
            raise ServerError(f"{self.base_url} did not force a token: --logprobs needs a vLLM server")
        with understood(response):
            logprob, named = float(logprobs["token_logprobs"][0]), logprobs["top_logprobs"][0]
            top = {int(name.removeprefix("token_id:")): float(value) for name, value in named.items()}
        if all(value < -1000 for token, value in top.items() if token != token_id):
            raise ServerError(
                "--logprobs needs log-probabilities before restrictions: vLLM's --logprobs-mode raw_logprobs"
            )
        return replace(completion, score=TokenScore(logprob=logprob, top=top))

    async def send(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request of any kind; returns the server's plan of its prompt (raises ServerError)."""
        response = await self._send("POST", path, {"model": (await self.facts()).model} | body)
        with understood(response):
            return dict(json.loads(response.headers.get(PLAN_HEADER, "{}")))

    async def look_up(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the server has cached of a request's prompt, which is not run (raises ServerError)."""
        response = await self._send("POST", f"{CACHED_PATH}{path}", {"model": (await self.facts()).model} | body)
        with understood(response):
            return dict(answer_json(response))

    async def _complete(self, token_ids: Sequence[int], plan: Plan, fields: dict[str, Any]) -> httpx.Response:
        facts = await self.facts()
        if not plan.is_dense:
            await self.refuse_without_starling(plan.name)
        body = {"model": facts.model, "prompt": list(token_ids), "temperature": 0} | fields
        if facts.starling:
            body["vllm_xargs"] = plan.options
        response = await self._send("POST", "/v1/completions", body)
        if facts.starling:
            with understood(response):
                check_engaged(response.headers.get(PLAN_HEADER), plan, len(token_ids))
        else:
            check_whole(response, len(token_ids))
        return response

    async def refuse_without_starling(self, plan: str) -> None:
        """Refuse (ServerError) a star plan, by its name, where Starling is not activated."""
        if not (await self.facts()).starling:
            raise ServerError(
                f"plan={plan!r} is refused: Starling is not activated on {self.base_url} (its responses have no "
                f"{PLAN_HEADER}), or a gateway leaves that header out. Allowed: dense, or a server of `starling serve`."
            )

    async def _send(self, method: str, path: str, body: Any = None, instead: str = "") -> httpx.Response:
        """One request, repeated where the connection fails, or the server says that it can't answer now.

        Args:
            instead: what the user can do where the server does not have the path, or refuses the request.

        Raises:
            ServerError: the request is refused, took too long, or the last attempt failed.
        """
        url = f"{self.base_url}{path}"
        pause = 0.0
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(max(pause, FIRST_PAUSE * 2 ** (attempt - 1)))
            try:
                response = await self._answer(method, path, body)
            except (httpx.ReadTimeout, TimeoutError):
                raise ServerError(
                    f"{url} did not answer within {self._timeout:g} s: give more with --timeout, or less --concurrency"
                ) from None
            except httpx.TransportError as error:
                failure, pause = f"{type(error).__name__}: {error}".rstrip(": "), 0.0
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ServerError(f"{url} can't be used: {type(error).__name__}: {error}") from None
            if response.is_success:
                return response
            if response.is_redirect:
                raise ServerError(
                    f"{url} redirects to {response.headers.get('location')}: give that server as --base-url"
                )
            failure, pause = f"HTTP {response.status_code}: {error_message(response)}", retry_after(response)
            if response.status_code == 404 and instead:
                raise ServerError(f"{self.base_url} has no {path}, which measures the lengths of prompts: {instead}")
            if instead and NO_CHAT not in failure:
                failure += f"\nIf this is not vLLM's {path}, {instead}"
            if response.is_client_error and response.status_code not in REPEATED:
                raise RequestRefused(f"{url} refused the request: {failure}")
        raise ServerError(f"{url} failed {ATTEMPTS} times, the last time with {failure}")

    async def _answer(self, method: str, path: str, body: Any) -> httpx.Response:
        """One attempt, with its whole answer. The time is that of all of it, however often the server sends a byte.

        Raises:
            ServerError: the answer is too large, or is compressed otherwise than asked for.
            TimeoutError: the answer took more than the client's timeout.
            httpx.HTTPError, httpx.InvalidURL: the connection failed, or can't be made.
        """
        async with asyncio.timeout(self._timeout), self._http.stream(method, path, json=body) as response:
            return await read_answer(response)


async def read_answer(response: httpx.Response) -> httpx.Response:
    """The whole answer of a response that was not read yet, within bounds, whatever the server sends.

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
    """The JSON of an answer, each text of which is plain (raises ValueError or RecursionError for another answer)."""
    return plain_json(response.json())


def optional_count(value: Any) -> int | None:
    """A number of tokens, or none (raises ValueError or TypeError for something else)."""
    return None if value is None else int(value)


def as_completion(response: httpx.Response) -> Completion:
    """The first choice of a response."""
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
        instead: what the user can do.
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
        ServerError: with the reason.
        ValueError, LookupError, TypeError, RecursionError: the header is not one of Starling's.
    """
    found = json.loads(header) if header else {"attention": "nothing"}
    attention = found["attention"]
    if attention != ("dense" if plan.is_dense else "star"):
        raise ServerError(
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
    """What a server says about an error, up to MAX_SERVER_WORDS characters."""
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return response.text[:MAX_SERVER_WORDS]
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:MAX_SERVER_WORDS]
