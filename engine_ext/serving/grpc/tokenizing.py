"""Tokenisation for Tokenize on a thread and a tokenizer of its own, so that a long text delays no prompt."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vllm.inputs import TextPrompt
from vllm.renderers import ChatParams, TokenizeParams

from starling.engine_ext.serving.errors import TokenizeMemoryError
from starling.engine_ext.serving.grpc.limits import MAX_REQUEST_BYTES
from starling.engine_ext.serving.grpc.prompt_inputs import PromptLimit, chat_tok_params, prompt_of, render_chat
from starling.engine_ext.serving.grpc.upload import Quota
from starling.v1 import inference_pb2 as pb


class Tokenizing:
    """Tokenizer of one request after the other.

    Args:
        renderer: the engine's renderer.
        chat: parameters for rendering chat messages.
        limit: the longest prompt.
    """

    def __init__(self, renderer: Any, chat: ChatParams, limit: PromptLimit) -> None:
        self.renderer = renderer
        self.chat = chat
        self.limit = limit
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="starling-tokenize")
        # A copy: a tokenizer can't work in two threads. Now, since a tokenizer can't work while it is copied.
        self.tokenizer = copy.deepcopy(renderer.tokenizer)
        self.quota = Quota(2 * MAX_REQUEST_BYTES, MAX_REQUEST_BYTES, TokenizeMemoryError)

    async def token_ids(self, request: pb.TokenizeRequest, client: str) -> list[int]:
        """Return the token ids of a request's prompt, even if it is somewhat longer than the model's context.

        Args:
            request: the client's request.
            client: name of the client, for its share of the waiting requests.

        Raises:
            VLLMValidationError, ValueError: the prompt is empty, or has more characters than any prompt of the model;
                or the messages can't be rendered.
            TokenizeMemoryError: other requests wait.
        """
        with self.quota.room(client) as room:
            room.take(request.ByteSize())
            params = self.renderer.default_cmpl_tok_params
            if request.WhichOneof("prompt") == "chat":
                self.limit.check_chat(request.chat)
                params = chat_tok_params(self.renderer)
                prompt = await render_chat(self.renderer, request.chat, self.chat)
                if "prompt_token_ids" in prompt:  # some models' templates make tokens
                    return list(prompt["prompt_token_ids"])
            else:
                prompt = prompt_of(request)
                self.limit.check_characters(len(prompt["prompt"]))
            self.renderer.get_tokenizer()  # refuses where there is none
            params = replace(params, max_total_tokens=None)
            return await self._in_turn(prompt, params)

    async def _in_turn(self, prompt: TextPrompt, params: TokenizeParams) -> list[int]:
        """Tokenise on the thread. A cancelled call ends only with its turn, as its text is in memory until then."""
        working = asyncio.get_running_loop().run_in_executor(self.thread, self._tokenize, prompt, params)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait({working})
            raise

    def _tokenize(self, prompt: TextPrompt, params: TokenizeParams) -> list[int]:
        text = params.apply_pre_tokenization(self.tokenizer, prompt)["prompt"]
        return list(self.tokenizer(text, **params.get_encode_kwargs())["input_ids"])
