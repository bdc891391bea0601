"""Prompts from starling.v1 to vLLM's renderer."""

import asyncio

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams

from engine_ext.serving.grpc import prompts
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (pb.GenerateStreamRequest(text="ä"), {"prompt": "ä"}),
        (pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=[0, 7])), {"prompt_token_ids": [0, 7]}),
    ],
    ids=["text", "token ids"],
)
def test_prompt(request_, prompt):
    assert prompts.prompt_of(request_) == prompt


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateStreamRequest(), "prompt"),
        (pb.GenerateStreamRequest(text=""), "text"),
        (pb.GenerateStreamRequest(token_ids=pb.TokenIds()), "token_ids"),
    ],
    ids=["none", "text", "token ids"],
)
def test_an_empty_prompt_is_refused_by_its_field(request_, field):
    with pytest.raises(VLLMValidationError) as refused:
        prompts.prompt_of(request_)
    assert refused.value.parameter == field


def chat(*roles: str, **fields) -> pb.TokenizeRequest:
    messages = [pb.ChatMessage(role=role, content=f"I am {role}") for role in roles]
    return pb.TokenizeRequest(chat=pb.Chat(messages=messages, **fields))


@pytest.mark.parametrize(
    ("request_", "opens"),
    [
        (chat("user"), True),
        (chat("user", add_generation_prompt=True), True),
        (chat("user", "assistant", add_generation_prompt=False), False),
    ],
    ids=["default", "true", "false"],
)
def test_chat_is_rendered_with_the_servers_options(request_, opens):
    engine = FakeEngine()
    server = ChatParams(chat_template="T", chat_template_kwargs={"enable_thinking": False})
    asyncio.run(prompts.render(engine, request_, server, {}))
    ((conversations, params, tokenizing),) = engine.rendered
    (messages,) = conversations
    assert [message["role"] for message in messages] == [message.role for message in request_.chat.messages]
    assert messages[0]["content"] == "I am user"
    assert params.chat_template == "T"
    assert params.chat_template_kwargs == {"enable_thinking": False, "add_generation_prompt": opens}
    assert tokenizing is None, "the renderer's own, which refuses a prompt beyond the context"


@pytest.mark.parametrize("request_", [chat("user"), pb.TokenizeRequest(text="a")], ids=["chat", "text"])
def test_any_length(request_):
    engine = FakeEngine()
    asyncio.run(prompts.render(engine, request_, ChatParams(), {}, any_length=True))
    (*_, tokenizing) = engine.rendered[0]
    assert tokenizing.max_total_tokens is None


@pytest.mark.parametrize(
    ("request_", "says"),
    [(chat(), "at least one message"), (chat("user", ""), "chat.messages[1] has no role")],
    ids=["no message", "no role"],
)
def test_bad_chat(request_, says):
    with pytest.raises(VLLMValidationError) as refused:
        asyncio.run(prompts.render(FakeEngine(), request_, ChatParams(), {}))
    assert refused.value.parameter == "chat"
    assert says in str(refused.value)


def test_harmony_is_refused():
    engine = FakeEngine()
    engine.model_config.hf_config.model_type = "gpt_oss"
    with pytest.raises(VLLMValidationError, match="send token_ids"):
        asyncio.run(prompts.render(engine, chat("user"), ChatParams(), {}))


def test_the_kinds_of_prompt_are_named():
    with pytest.raises(VLLMValidationError, match="set text or chat"):
        prompts.prompt_of(pb.TokenizeRequest())
    with pytest.raises(VLLMValidationError, match="set text or token_ids or chat"):
        prompts.prompt_of(pb.GenerateRequest())
