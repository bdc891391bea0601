"""The tokenizer of a folder, for a server without vLLM's /tokenize."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starling.lab.evaluation.prompts import NO_TEMPLATE

ALLOWED = "Allowed: a folder with the model's tokenizer_config.json and tokenizer.json, without code of its own"


class LocalTokenizer:
    """A model's tokenizer, with the calls of ``prompts.Tokenizer``. They run in a thread, so that signals are seen.

    Args:
        folder: folder with a tokenizer of Transformers, such as the model's.

    Raises:
        ValueError: Transformers is not installed, or finds no tokenizer there.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():  # Transformers would look for a model of this name on a hub
            raise ValueError(f"tokenizer={str(folder)!r} is refused: it is no folder. {ALLOWED}")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(f"--tokenizer needs Transformers (pip install transformers): {error}") from None
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever Transformers makes of a user's files
            raise ValueError(f"tokenizer={str(folder)!r} is refused: {error}\n{ALLOWED}") from None
        tokenizer.model_max_length = sys.maxsize  # no warning about lengths: the server refuses long prompts
        self._tokenizer = tokenizer

    async def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return list(await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=False))

    async def tokenize_prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with those that the tokenizer puts before each prompt."""
        return list(await asyncio.to_thread(self._tokenizer.encode, text))

    async def tokenize_chat(self, messages: Sequence[Any]) -> list[int]:
        """Return the tokens of a chat with the folder's template, up to where the answer begins.

        Raises:
            ValueError: there is no template, or it does not take these messages.
        """
        try:
            return await self.tokenize(await asyncio.to_thread(self._chat, [joined(message) for message in messages]))
        except Exception as error:  # a template is a program
            hint = "" if self._tokenizer.chat_template else f"\n{NO_TEMPLATE}"
            raise ValueError(f"the tokenizer's chat template can't make the chat: {error}{hint}") from None

    def _chat(self, messages: list[Any]) -> str:
        """Return a chat as text. Some templates take texts, others lists of parts, and silently leave a text out."""
        of_user = [message["content"] for message in messages if message.get("role") == "user" and message["content"]]
        for form in (messages, [in_parts(message) for message in messages]):
            chat: str = self._tokenizer.apply_chat_template(form, add_generation_prompt=True, tokenize=False)
            if not of_user or of_user[-1].strip() in chat:
                return chat
        raise ValueError("it leaves out the user's last text")


def joined(message: Any) -> dict[str, Any]:
    """Return a message as vLLM gives it to most templates.

    Its content is one text, with a line for each part, and arguments of tools are objects.

    Raises:
        ValueError: a part is no text.
    """
    content, changed = message.get("content"), dict(message)  # None beside calls of tools
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else part.get("text") for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("a message has a part that is no text")
        content = "\n".join(parts)
    changed["content"] = content or ""
    if message.get("tool_calls"):
        changed["tool_calls"] = [with_arguments(call) for call in message["tool_calls"]]
    return changed


def with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a tool with its arguments, a JSON text in OpenAI's API, as an object, as templates expect them.

    As in vLLM, arguments that are no object are an empty one.
    """
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return call | {"function": call["function"] | {"arguments": arguments if isinstance(arguments, dict) else {}}}


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its text as a list of one part."""
    text = message.get("content")
    return message | {"content": [{"type": "text", "text": text}]} if isinstance(text, str) else message
