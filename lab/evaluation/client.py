"""The client of a server with OpenAI's completions API, and vLLM's /tokenize unless the tokenizer is given."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from starling.lab.evaluation.answers import (
    ACCEPTED,
    MAX_SERVER_WORDS,
    PLAN_HEADER,
    Completion,
    RequestRefused,
    ServerError,
    answer_json,
    as_completion,
    check_engaged,
    check_whole,
    error_message,
    optional_count,
    read_answer,
    retry_after,
    understood,
)
from starling.lab.evaluation.prompt_options import Plan
from starling.lab.evaluation.prompts import NO_TEMPLATE, Tokenizer
from starling.lab.evaluation.store import TokenScore

CONNECT_SECONDS = 30.0
ATTEMPTS = 4
FIRST_PAUSE = 1.0  # seconds before the second attempt; each further pause is twice as long
REPEATED = (408, 425, 429)  # besides 5xx: the same request may succeed later
NO_TOKENIZE = "give the folder of the model's tokenizer with --tokenizer"
NO_CHAT = "chat template"  # in vLLM's words where a model has none
TOP_LOGPROBS = 20  # vLLM's --max-logprobs by default
CACHED_PATH = "/starling/cached"


def make_http(base_url: str, api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """Make the connections to a server. Those to this machine go to no proxy, whatever the environment says.

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
    """Return whether a URL names a loopback address."""
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


@dataclass(frozen=True)
class ServerFacts:
    """Facts that a server gives about itself.

    Attributes:
        model: name of the model that is asked.
        max_model_len: tokens of a prompt and its output, or None where the server does not say.
        starling: True if Starling is activated, so that requests can have star plans.
        version: version of vLLM, or None where the server does not say.
    """

    model: str
    max_model_len: int | None
    starling: bool
    version: str | None


class Client:
    """A server, as an asynchronous context manager.

    Args:
        base_url: URL such as http://localhost:8000, with or without /v1.
        model: its name on the server, or None if the server has only one.
        api_key: key that is sent as a bearer token.
        timeout: seconds that an answer may take.
        tokenizer: the model's tokenizer, or None for the server's /tokenize.

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
        """Return what the server says about itself; asked once, with one short completion.

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
        """Return the tokenizer of prompts."""
        return self if self._own_tokenizer is None else self._own_tokenizer

    async def _version(self) -> str | None:
        try:
            return str(answer_json(await self._send("GET", "/version"))["version"])[:MAX_SERVER_WORDS]
        except (ServerError, ValueError, KeyError, TypeError, RecursionError):
            return None

    async def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return await self._tokens({"prompt": text, "add_special_tokens": False})

    async def tokenize_prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with those that the tokenizer puts before each prompt."""
        return await self._tokens({"prompt": text})

    async def tokenize_chat(self, messages: Sequence[Any]) -> list[int]:
        """Return the tokens of a chat with the model's template, up to where the answer begins.

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
        """Return the greedy output of a prompt.

        Args:
            token_ids: tokens of the prompt.

        Raises:
            ServerError: also where the plan did not engage.
        """
        response = await self._complete(token_ids, plan, {"max_tokens": max_tokens, "return_token_ids": True})
        return as_completion(response)

    async def seconds_to_first_token(self, token_ids: Sequence[int], plan: Plan) -> float:
        """Return how long the first token of a prompt takes of which nothing is cached (raises ServerError)."""
        fields = {"max_tokens": 1, "cache_salt": uuid.uuid4().hex}
        started = time.perf_counter()
        await self._complete(token_ids, plan, fields)
        return time.perf_counter() - started

    async def score_token(self, token_ids: Sequence[int], plan: Plan, token_id: int) -> Completion:
        """Return the log-probabilities at the position behind a prompt, of ``token_id`` and the most probable tokens.

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
        """Return what the server has cached of a request's prompt, which is not run (raises ServerError)."""
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
        """Send one request, again where the connection fails, or the server says that it can't answer now.

        Args:
            instead: advice for the user where the server does not have the path, or refuses the request.

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
        """Make one attempt, with its whole answer.

        The time is that of all of it, however often the server sends a byte.

        Raises:
            ServerError: the answer is too large, or is compressed otherwise than asked for.
            TimeoutError: the answer took more than the client's timeout.
            httpx.HTTPError, httpx.InvalidURL: the connection failed, or can't be made.
        """
        async with asyncio.timeout(self._timeout), self._http.stream(method, path, json=body) as response:
            return await read_answer(response)
