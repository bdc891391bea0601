"""The tokenizer of a folder, for a server without vLLM's /tokenize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_ext.evaluation.prompts import NO_TEMPLATE


class LocalTokenizer:
    """A model's tokenizer, with the calls of ``prompts.Tokenizer``.

    Args:
        folder: with a tokenizer of Transformers (tokenizer.json, tokenizer_config.json), such as the model's.

    Raises:
        ValueError: Transformers finds no tokenizer there.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        allowed = "Allowed: a folder with the model's tokenizer_config.json and tokenizer.json"
        if not folder.is_dir():  # Transformers would look for a model of this name on a hub
            raise ValueError(f"tokenizer={str(folder)!r} is refused: it is no folder. {allowed}")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
            raise ValueError(f"tokenizer={str(folder)!r} is refused: {error}\n{allowed}") from None

    async def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    async def tokenize_prompt(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer puts before each prompt."""
        return list(self._tokenizer.encode(text))

    async def tokenize_chat(self, messages: Sequence[Any]) -> list[int]:
        """The tokens of a chat with the model's template, up to where the answer begins.

        Raises:
            ValueError: there is no template, or it does not take these messages.
        """
        from jinja2 import TemplateError

        try:
            tokens = self._tokenizer.apply_chat_template(
                list(map(joined, messages)), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (ValueError, TypeError, LookupError, AttributeError, TemplateError) as error:
            raise ValueError(f"the tokenizer's chat template can't make the chat: {error}\n{NO_TEMPLATE}") from None
        return list(tokens)


def joined(message: Any) -> Any:
    """A message whose parts of text are one text, with a line for each part, as vLLM gives it to most templates."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": "\n".join(part["text"] for part in message["content"])}
