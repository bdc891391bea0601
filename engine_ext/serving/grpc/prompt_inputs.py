"""Engine input of a request's prompt (text, texts, chat messages or token ids), made with vLLM's renderer."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers import ChatParams, TokenizeParams
from vllm.renderers.chat_utils import load_chat_template
from vllm.utils.mistral import is_mistral_tokenizer

from starling.engine_ext.front.requests import KNOWN_SEGMENTS
from starling.scheduler.planning.facts import KnownSegments
from starling.v1 import inference_pb2 as pb
from starling.vllm_compat.server_socket import default_chat_template_kwargs

GenerateRequest = pb.GenerateStreamRequest | pb.GenerateRequest
PromptRequest = GenerateRequest | pb.TokenizeRequest
PIECE_IDS, PIECE_TEXTS = 2**16, 256
MAX_TEXTS = 2**13


def chat_params(args: Namespace) -> ChatParams:
    """Return the HTTP server's parameters for chat messages, from its options."""
    return ChatParams(
        chat_template=load_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        chat_template_kwargs=default_chat_template_kwargs(args),
    )


def prompt_field(request: PromptRequest) -> str:
    """Return the field that holds the prompt, to name it in an error."""
    return request.WhichOneof("prompt") or "prompt"


@dataclass(frozen=True)
class PromptLimit:
    """Size of the longest prompt of a model, output included.

    Attributes:
        tokens: number of tokens of that prompt.
        characters: largest number of characters of a prompt of text, or None if the server has no tokenizer.
    """

    tokens: int
    characters: int | None

    def check_ids(self, number: int) -> None:
        """Check a number of token ids (raises VLLMValidationError if it is above the limit)."""
        if number > self.tokens:
            reason = f"The prompt has {number} token ids or more; the model's context has {self.tokens}."
            raise VLLMValidationError(reason, parameter="token_ids")

    def check_chat(self, chat: pb.Chat) -> None:
        """Check the numbers of messages and characters (raises VLLMValidationError if they are above the limit)."""
        if len(chat.messages) > self.tokens:
            reason = f"The prompt has {len(chat.messages)} messages; the model's context has {self.tokens} tokens."
            raise VLLMValidationError(reason, parameter="chat")
        self.check_characters(sum(len(message.role) + len(message.content) for message in chat.messages))

    def check_texts(self, texts: Sequence[str]) -> None:
        """Check a prompt of texts (raises VLLMValidationError if no prompt can be made of them)."""
        most = min(self.tokens, MAX_TEXTS)
        if len(texts) > most:
            reason = f"The prompt has {len(texts)} texts; it may have {most} at most."
            raise VLLMValidationError(reason, parameter="texts")
        if len(texts) < 2:
            reason = f"The prompt has {len(texts)} texts; it needs two or more: a head, documents, and the question."
            raise VLLMValidationError(reason, parameter="texts")
        if "" in texts:
            raise VLLMValidationError(f"texts.texts[{list(texts).index('')}] is empty.", parameter="texts")
        self.check_characters(sum(map(len, texts)))

    def check_characters(self, number: int) -> None:
        """Check a number of characters (raises VLLMValidationError if it is above the limit)."""
        if self.characters is not None and number > self.characters:
            reason = f"{self.characters} make more tokens than the {self.tokens} of the model's context"
            raise VLLMValidationError(f"The prompt has {number} characters or more; {reason}.", parameter="text")


def prompt_limit(engine: Any) -> PromptLimit:
    """Return the size of the longest prompt of an engine's model."""
    tokens, tokenizer = engine.model_config.max_model_len, engine.renderer.tokenizer
    return PromptLimit(tokens, None if tokenizer is None else tokens * tokenizer.max_chars_per_token)


def prompt_of(request: pb.TokenizeRequest | GenerateRequest) -> TextPrompt:
    """Return a prompt of text, as vLLM's renderer takes it.

    Raises:
        VLLMValidationError: the prompt is empty.
    """
    if prompt_field(request) == "text" and request.text:
        return TextPrompt(prompt=request.text)
    kinds = [kind.name for kind in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
    raise VLLMValidationError(f"The prompt is empty: set {' or '.join(kinds)}.", parameter=prompt_field(request))


async def token_list(ids: MutableSequence[int], check: Callable[[list[int]], None]) -> list[int]:
    """Return a message's token ids as a list. The event loop runs between its pieces.

    Args:
        ids: the token ids of the message.
        check: called with each piece.
    """
    numbers: list[int] = []
    for start in range(0, len(ids), PIECE_IDS):
        if start:
            await asyncio.sleep(0)
        piece = list(ids[start : start + PIECE_IDS])
        check(piece)
        numbers.extend(piece)
    return numbers


def conversation_of(chat: pb.Chat) -> list[dict[str, Any]]:
    """Return messages as vLLM's renderer takes them.

    Raises:
        VLLMValidationError: there is no message, or a message has no role.
    """
    if not chat.messages:
        raise VLLMValidationError("The prompt is empty: chat.messages needs at least one message.", parameter="chat")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise VLLMValidationError(f"chat.messages[{index}] has no role.", parameter="chat")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


async def render_chat(renderer: Any, messages: pb.Chat, chat: ChatParams) -> Any:
    """Render a conversation to a prompt: text, or tokens if the model's template makes tokens.

    Raises:
        VLLMValidationError, ValueError: the messages can't be rendered, see ``render``.
    """
    _, prompt = await renderer.render_messages_async(*chat_arguments(renderer, messages, chat))
    return prompt


def chat_arguments(renderer: Any, messages: pb.Chat, chat: ChatParams) -> tuple[list[dict[str, Any]], ChatParams]:
    """Return a conversation and its parameters, for vLLM's renderer (raises VLLMValidationError)."""
    conversation = conversation_of(messages)
    if renderer.model_config.hf_config.model_type == "gpt_oss":
        reason = "this model's messages are not rendered by a template: render them and send token_ids"
        raise VLLMValidationError(f"chat is refused: {reason}", parameter="chat")
    opens_turn = not messages.HasField("add_generation_prompt") or messages.add_generation_prompt
    kwargs = chat.chat_template_kwargs | {"add_generation_prompt": opens_turn}
    if not is_mistral_tokenizer(renderer.tokenizer):  # as the HTTP server: its templates make no text
        kwargs["tokenize"] = False
    return conversation, replace(chat, chat_template_kwargs=kwargs)


def chat_tok_params(renderer: Any) -> TokenizeParams:
    """Return the parameters for tokenising a chat's text, whose template has already put in the special tokens."""
    return replace(renderer.default_chat_tok_params, add_special_tokens=False)


async def render(
    renderer: Any, request: GenerateRequest, chat: ChatParams, extras: dict[str, Any], limit: PromptLimit
) -> Any:
    """Return the engine's input, with the prompt's tokens in `prompt_token_ids`.

    Args:
        renderer: the engine's renderer.
        request: the client's request.
        chat: the server's chat parameters, from ``chat_params``.
        extras: additional keys of the engine's input.
        limit: the longest prompt.

    Raises:
        VLLMValidationError, ValueError: the prompt is empty or too long, has unknown ids, or has messages that the
            template refuses; or the model has no template.
    """
    if request.WhichOneof("prompt") == "chat":
        limit.check_chat(request.chat)
        conversation, params = chat_arguments(renderer, request.chat, chat)
        tokens = chat_tok_params(renderer)
        _, (engine_input,) = await renderer.render_chat_async([conversation], params, tokens, prompt_extras=extras)
        return engine_input
    if request.WhichOneof("prompt") == "texts":
        return await render_texts(renderer, request.texts.texts, extras, limit)
    prompt: TextPrompt | TokensPrompt
    if request.token_ids.ids:
        limit.check_ids(len(request.token_ids.ids))
        check = partial(renderer.validate_token_ids, parameter="token_ids")
        prompt = TokensPrompt(prompt_token_ids=await token_list(request.token_ids.ids, check))
    else:
        prompt = prompt_of(request)
    (engine_input,) = await renderer.render_cmpl_async([prompt], None, prompt_extras=extras)
    return engine_input


async def render_texts(renderer: Any, texts: Sequence[str], extras: dict[str, Any], limit: PromptLimit) -> Any:
    """Return the engine's input for texts that are tokenised one by one, with their starts as its KnownSegments.

    Args:
        renderer: the engine's renderer.
        texts: the texts of the prompt.
        extras: additional keys of the engine's input.
        limit: the longest prompt.

    Raises:
        VLLMValidationError, ValueError: the prompt is refused as by ``render``; or a text has no tokens.
    """
    limit.check_texts(texts)
    first = renderer.default_cmpl_tok_params
    others = replace(first, add_special_tokens=False)
    pieces = [texts[:1], *(texts[start : start + PIECE_TEXTS] for start in range(1, len(texts), PIECE_TEXTS))]
    tokens: list[list[int]] = []
    for number, piece in enumerate(pieces):  # the event loop runs between them
        prompts = [TextPrompt(prompt=text) for text in piece]
        made = await renderer.render_cmpl_async(prompts, others if number else first, prompt_extras=None)
        tokens += [one["prompt_token_ids"] for one in made]
    if [] in tokens:
        raise VLLMValidationError(f"texts.texts[{tokens.index([])}] has no tokens.", parameter="texts")
    starts = tuple(accumulate(map(len, tokens[:-1])))
    prompt = TokensPrompt(prompt_token_ids=[token for text in tokens for token in text])
    (engine_input,) = await renderer.render_cmpl_async([prompt], None, prompt_extras=extras)
    return {**engine_input, KNOWN_SEGMENTS: KnownSegments("texts", starts)}
