"""Texts and chats as vLLM's renderer makes prompts of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from starling.vllm_compat.patching import Original, wrap


def on_rendered_chat(
    wanted: Callable[[Any], bool], add: Callable[[Any, Sequence[Any], Any, dict[str, Any]], Awaitable[None]]
) -> None:
    """Let ``add(renderer, messages, chat_params, engine_input)`` add to the engine inputs of a server's chats.

    Where ``wanted(renderer)`` is true the engine input has ``prompt_token_offsets``: the characters of each token in
    ``prompt``, the rendered text. A renderer whose tokenizer can't say them leaves them out. They are removed again
    unless the request itself asks for them. Goes when vLLM says which tokens of a chat a message has.
    """
    from vllm.renderers.base import BaseRenderer

    @wrap(BaseRenderer, "render_chat_async")
    async def render_chat_async(
        original: Original,
        self: Any,
        conversations: Sequence[Any],
        chat_params: Any,
        tok_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not wanted(self):
            return await original(self, conversations, chat_params, tok_params, **kwargs)
        own = tok_params or self.default_chat_tok_params
        with_offsets = replace(own, return_token_offsets=True)
        rendered, engine_inputs = await original(self, conversations, chat_params, with_offsets, **kwargs)
        for messages, engine_input in zip(conversations, engine_inputs, strict=True):
            await add(self, messages, chat_params, engine_input)
            if not own.return_token_offsets:
                engine_input.pop("prompt_token_offsets", None)
        return rendered, engine_inputs


def before_tokenizing(check: Callable[[Any, str, Any], Any]) -> None:
    """Let ``check(renderer, text, params)`` give the TokenizeParams with which a server tokenises a text, or raise.

    Goes when vLLM bounds the text of each request.
    """
    from vllm.renderers.base import BaseRenderer

    @wrap(BaseRenderer, "_tokenize_singleton_prompt_async")
    async def tokenize(original: Original, self: Any, prompt: Any, params: Any) -> Any:
        text = prompt.get("prompt")
        if isinstance(text, str) and "prompt_token_ids" not in prompt and "prompt_embeds" not in prompt:
            params = check(self, text, params)
        return await original(self, prompt, params)
