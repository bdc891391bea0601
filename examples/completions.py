"""A stream of the completions API: its text, when its first token came, and how many prompt tokens were computed."""

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI


@dataclass
class Answer:
    """Answer to a request.

    Attributes:
        seconds: time from the request to the first token.
        cached_tokens: None from a server without --star-segments or --enable-prompt-tokens-details.
        plan: the response's x-starling-plan; empty from a server without Starling.
    """

    text: str
    seconds: float
    prompt_tokens: int
    cached_tokens: int | None
    plan: dict[str, Any]

    @property
    def computed(self) -> int | None:
        """Return the prompt tokens that were not cached."""
        return None if self.cached_tokens is None else self.prompt_tokens - self.cached_tokens


class Completions:
    """A client of the first model of a server. Raises OpenAIError and httpx.HTTPError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
        self.model = self.client.models.list().data[0].id

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text without the tokens that a model adds in front."""
        response = httpx.post(f"{self.url}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=60)
        response.raise_for_status()
        return response.json()["tokens"]

    def ask(self, prompt: str, star: dict[str, Any], max_tokens: int, **fields: Any) -> Answer:
        """Complete a prompt greedily.

        Args:
            star: Starling's options of the request; none: dense attention, unless the server has other defaults.
            fields: further fields of the request's body.
        """
        start = time.perf_counter()
        response = self.client.completions.with_raw_response.create(
            model=self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"add_special_tokens": False, "vllm_xargs": star, **fields},
        )
        text, seconds, usage = "", None, None
        for chunk in response.parse():
            seconds = seconds or time.perf_counter() - start
            text += "".join(choice.text for choice in chunk.choices)
            usage = chunk.usage or usage
        details = usage.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        plan = json.loads(response.headers.get("x-starling-plan", "{}"))
        return Answer(text, seconds, usage.prompt_tokens, cached, plan)
