"""Makes the engine's input of a request's prompt (text, chat messages or token ids) with vLLM's renderer."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import load_chat_template

from starling.v1 import inference_pb2 as pb
from vllm_compat.server import default_chat_template_kwargs

GenerateRequest = pb.GenerateStreamRequest | pb.GenerateRequest
PromptRequest = GenerateRequest | pb.TokenizeRequest


def chat_params(args: Namespace) -> ChatParams:
    """The HTTP server's parameters for chat messages, from its options."""
    return ChatParams(
        chat_template=load_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        chat_template_kwargs=default_chat_template_kwargs(args),
    )


def prompt_field(request: PromptRequest) -> str:
    """The field that holds the prompt, to name in an error."""
    return request.WhichOneof("prompt") or "prompt"


def prompt_of(request: PromptRequest) -> TextPrompt | TokensPrompt:
    """A prompt of text or token ids, as vLLM's renderer takes it.

    Raises:
        VLLMValidationError: the prompt is empty.
    """
    field = prompt_field(request)
    if field == "text" and request.text:
        return TextPrompt(prompt=request.text)
    if isinstance(request, GenerateRequest) and request.token_ids.ids:
        return TokensPrompt(prompt_token_ids=list(request.token_ids.ids))
    kinds = [kind.name for kind in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
    raise VLLMValidationError(f"The prompt is empty: set {' or '.join(kinds)}.", parameter=field)


def conversation_of(chat: pb.Chat) -> list[dict[str, Any]]:
    """Messages as vLLM's renderer takes them.

    Raises:
        VLLMValidationError: there is no message, or a message has no role.
    """
    if not chat.messages:
        raise VLLMValidationError("The prompt is empty: chat.messages needs at least one message.", parameter="chat")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise VLLMValidationError(f"chat.messages[{index}] has no role.", parameter="chat")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


async def render(
    renderer: Any, request: PromptRequest, chat: ChatParams, extras: dict[str, Any], *, any_length: bool = False
) -> Any:
    """The engine's input, with the prompt's tokens in `prompt_token_ids`.

    Args:
        renderer: the engine's.
        chat: the server's, from ``chat_params``.
        extras: more keys of the engine's input.
        any_length: render also a prompt that is longer than the model's context.

    Raises:
        VLLMValidationError, ValueError: the prompt is empty or too long, has unknown ids, or has messages that the
            template refuses; or the model has no template.
    """
    if request.WhichOneof("prompt") == "chat":
        conversation = conversation_of(request.chat)
        if renderer.model_config.hf_config.model_type == "gpt_oss":
            reason = "this model's messages are not rendered by a template: render them and send token_ids"
            raise VLLMValidationError(f"chat is refused: {reason}", parameter="chat")
        opens_turn = not request.chat.HasField("add_generation_prompt") or request.chat.add_generation_prompt
        kwargs = chat.chat_template_kwargs | {"add_generation_prompt": opens_turn}
        tokenizing = replace(renderer.default_chat_tok_params, max_total_tokens=None) if any_length else None
        _, (engine_input,) = await renderer.render_chat_async(
            [conversation], replace(chat, chat_template_kwargs=kwargs), tokenizing, prompt_extras=extras
        )
        return engine_input
    prompt = prompt_of(request)
    renderer.validate_token_ids(prompt.get("prompt_token_ids", ()), parameter="token_ids")
    tokenizing = replace(renderer.default_cmpl_tok_params, max_total_tokens=None) if any_length else None
    (engine_input,) = await renderer.render_cmpl_async([prompt], tokenizing, prompt_extras=extras)
    return engine_input
