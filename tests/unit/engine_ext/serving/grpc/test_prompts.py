"""Prompts from starling.v1 to vLLM's renderer."""

import asyncio

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams, TokenizeParams

from starling.engine_ext.front.requests import KNOWN_SEGMENTS
from starling.engine_ext.serving.grpc import prompt_inputs
from starling.scheduler.planning.facts import KnownSegments
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine

LIMIT = prompt_inputs.PromptLimit(1000, 8000)


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (pb.GenerateStreamRequest(text="ä"), {"prompt": "ä"}),
        (pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=[0, 7])), {"prompt_token_ids": [0, 7]}),
    ],
    ids=["text", "token ids"],
)
def test_prompt(request_, prompt):
    engine = FakeEngine()
    asyncio.run(prompt_inputs.render(engine, request_, ChatParams(), {}, LIMIT))
    assert engine.rendered == [([prompt], None)]


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
        prompt_inputs.prompt_of(request_)
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
    asyncio.run(prompt_inputs.render(engine, request_, server, {}, LIMIT))
    ((conversations, params, tokenizing),) = engine.rendered
    (messages,) = conversations
    assert [message["role"] for message in messages] == [message.role for message in request_.chat.messages]
    assert messages[0]["content"] == "I am user"
    assert params.chat_template == "T"
    wanted = {"enable_thinking": False, "add_generation_prompt": opens, "tokenize": False}
    assert params.chat_template_kwargs == wanted
    assert not tokenizing.add_special_tokens, "the template adds them"
    assert tokenizing.max_total_tokens == 1000, "so that a prompt beyond the context is refused"


class NumberedRenderer(FakeEngine):
    """Notes how many token ids are checked at once, and lets other tasks note that they run between."""

    def validate_token_ids(self, ids, parameter) -> None:
        self.rendered.append(len(ids))


def test_many_token_ids_leave_room_for_other_tasks():
    async def scenario():
        renderer = NumberedRenderer(max_model_len=10**6)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(3 * prompt_inputs.PIECE_IDS + 1)))
        limit = prompt_inputs.prompt_limit(renderer)
        rendering = asyncio.create_task(prompt_inputs.render(renderer, request, ChatParams(), {}, limit))
        while not rendering.done():
            renderer.rendered.append("other")
            await asyncio.sleep(0)
        return renderer.rendered

    *turns, (rendered, _) = asyncio.run(scenario())
    assert [turn for turn in turns if turn != "other"] == [prompt_inputs.PIECE_IDS] * 3 + [1]
    assert turns == [turn for piece in [prompt_inputs.PIECE_IDS] * 3 + [1] for turn in ("other", piece)]
    assert rendered == [{"prompt_token_ids": list(range(3 * prompt_inputs.PIECE_IDS + 1))}]


def test_more_ids_than_the_context_are_refused_before_they_are_a_list():
    renderer = NumberedRenderer(max_model_len=100)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(101)))
    with pytest.raises(VLLMValidationError, match="101 token ids"):
        asyncio.run(prompt_inputs.render(renderer, request, ChatParams(), {}, prompt_inputs.prompt_limit(renderer)))
    assert renderer.rendered == []


@pytest.mark.parametrize(
    ("request_", "says"),
    [(chat(), "at least one message"), (chat("user", ""), "chat.messages[1] has no role")],
    ids=["no message", "no role"],
)
def test_bad_chat(request_, says):
    with pytest.raises(VLLMValidationError) as refused:
        asyncio.run(prompt_inputs.render(FakeEngine(), request_, ChatParams(), {}, LIMIT))
    assert refused.value.parameter == "chat"
    assert says in str(refused.value)


def test_harmony_is_refused():
    engine = FakeEngine()
    engine.model_config.hf_config.model_type = "gpt_oss"
    with pytest.raises(VLLMValidationError, match="send token_ids"):
        asyncio.run(prompt_inputs.render(engine, chat("user"), ChatParams(), {}, LIMIT))


def test_the_kinds_of_prompt_are_named():
    with pytest.raises(VLLMValidationError, match="set text or chat"):
        prompt_inputs.prompt_of(pb.TokenizeRequest())
    with pytest.raises(VLLMValidationError, match="set text or token_ids or chat"):
        prompt_inputs.prompt_of(pb.GenerateRequest())


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        (pb.Chat(messages=[pb.ChatMessage(role="a", content="b")] * 4), "4 messages"),
        (pb.Chat(messages=[pb.ChatMessage(role="a" * 10, content="b" * 21)]), "31 characters"),
    ],
    ids=["messages", "a long role"],
)
def test_messages_that_no_context_holds_are_refused(chat, says):
    with pytest.raises(VLLMValidationError, match=says):
        prompt_inputs.PromptLimit(3, 30).check_chat(chat)


class ByteRenderer:
    """A token for each letter, and one before the prompt; spaces are none."""

    BOS = 1
    default_cmpl_tok_params = TokenizeParams(max_total_tokens=50)

    async def render_cmpl_async(self, prompts, tok_params, prompt_extras):
        made = []
        for prompt in prompts:
            ids = prompt.get("prompt_token_ids")
            if ids is None:
                ids = [self.BOS] * tok_params.add_special_tokens + list(prompt["prompt"].replace(" ", "").encode())
            made.append({"type": "token", "prompt_token_ids": ids} | (prompt_extras or {}))
        return made


def render_texts(*texts: str):
    request = pb.GenerateStreamRequest(texts=pb.Texts(texts=texts))
    return asyncio.run(prompt_inputs.render(ByteRenderer(), request, ChatParams(), {"cache_salt": "me"}, LIMIT))


def test_texts_are_tokenised_one_by_one_and_start_where_the_one_before_ends():
    made = render_texts("he ad", "doc", "a document", "why")
    assert made["prompt_token_ids"] == [1, *b"headdocadocumentwhy"]
    assert made[KNOWN_SEGMENTS] == KnownSegments("texts", (5, 8, 17))
    assert made["cache_salt"] == "me"


def test_many_texts_leave_room_for_other_tasks(monkeypatch):
    """They are tokenised in pieces, with special tokens in front of the first alone."""
    monkeypatch.setattr(prompt_inputs, "PIECE_TEXTS", 4)
    made = render_texts(*(f"{number} " for number in range(9)))
    assert made["prompt_token_ids"] == [1, *b"012345678"]
    assert made[KNOWN_SEGMENTS] == KnownSegments("texts", tuple(range(2, 10)))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "has 0 texts; it needs two or more"),
        (["one"], "has 1 texts; it needs two or more"),
        (["one", "", "two"], r"texts.texts\[1\] is empty"),
        (["one", "two", "  "], r"texts.texts\[2\] has no tokens"),
        (["x"] * 1001, "has 1001 texts; it may have 1000 at most"),
        (["x" * 4000, "x" * 4001], "has 8001 characters or more"),
    ],
    ids=["none", "one", "empty", "no tokens", "many", "long"],
)
def test_texts_of_which_no_prompt_can_be_made_are_refused(texts, says):
    with pytest.raises(VLLMValidationError, match=says) as refused:
        render_texts(*texts)
    assert refused.value.parameter in ("texts", "text")
