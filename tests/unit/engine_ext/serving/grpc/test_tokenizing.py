"""Tokenize: on a thread of its own, with a bound for each text, for each client and for all."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from starling.engine_ext.serving.grpc.upload import Quota
from starling.v1 import inference_pb2 as pb
from tests.unit.engine_ext.serving.grpc.fakes import FakeEngine, FakeTokenizer, front_of, until

TEXT = pb.TokenizeRequest(text="abc")


class SlowTokenizer(FakeTokenizer):
    """Waits for an event with each text. Copies share the events."""

    def __init__(self) -> None:
        self.go, self.texts = threading.Event(), []

    def __deepcopy__(self, memo):
        copy = SlowTokenizer()
        copy.go, copy.texts = self.go, self.texts
        return copy

    def __call__(self, text, **kwargs):
        self.texts.append(text)
        assert self.go.wait(300)
        return super().__call__(text)


@pytest.fixture
def engine():
    engine = FakeEngine("a")
    engine.tokenizer = SlowTokenizer()
    yield engine
    engine.tokenizer.go.set()


def test_a_prompt_is_served_while_a_text_is_tokenised(engine):
    async def scenario():
        async with front_of(engine) as client:
            tokenising = asyncio.ensure_future(client.stub.Tokenize(TEXT))
            await until(lambda: engine.tokenizer.texts)
            reply = await client.stub.Generate(pb.GenerateRequest(text="abc"), timeout=300)
            engine.tokenizer.go.set()
            return reply.choices[0].text, (await tokenising).count

    assert asyncio.run(scenario()) == ("a", 10)


def test_a_client_with_many_texts_leaves_room_for_others(engine):
    async def scenario():
        async with front_of(engine, api_keys=["one", "two"]) as client:
            tokenizing = client.front.inference.tokenizing
            size = TEXT.ByteSize()
            tokenizing.quota = Quota(3 * size, 2 * size, tokenizing.quota.make_error)

            def tokenize(key):
                return client.stub.Tokenize(TEXT, metadata=[("authorization", f"Bearer {key}")], timeout=300)

            calls = [asyncio.ensure_future(tokenize("one").code()) for _ in range(2)]
            await until(lambda: tokenizing.quota.used.total() == 2 * size)
            full = [await tokenize("one").code()]
            calls.append(asyncio.ensure_future(tokenize("two").code()))
            await until(lambda: tokenizing.quota.used.total() == 3 * size)
            full.append(await tokenize("two").code())
            engine.tokenizer.go.set()
            return full, await asyncio.gather(*calls), tokenizing.quota.used

    full, served, used = asyncio.run(scenario())
    assert full == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
    assert served == [grpc.StatusCode.OK] * 3
    assert used == {}


CHAT = pb.TokenizeRequest(chat={"messages": [{"role": "user", "content": "x" * 600_000}] * 2})


@pytest.mark.parametrize("request_", [pb.TokenizeRequest(text="x" * 1_000_001), CHAT], ids=["text", "chat"])
def test_a_text_longer_than_any_prompt_is_refused_before_the_tokenizer(engine, request_):
    async def scenario():
        engine.tokenizer.max_chars_per_token = 1000
        async with front_of(engine) as client:
            return await client.stub.Tokenize(request_, timeout=300).code()

    assert asyncio.run(scenario()) == grpc.StatusCode.INVALID_ARGUMENT
    assert engine.tokenizer.texts == []


def test_a_prompt_longer_than_the_context_is_tokenised():
    async def scenario():
        async with front_of(FakeEngine(max_model_len=5)) as client:
            return await client.stub.Tokenize(TEXT, timeout=300)

    assert asyncio.run(scenario()).count == 10


def test_a_text_that_waits_is_counted_after_its_client_has_cancelled(engine):
    async def scenario():
        async with front_of(engine) as client:
            quota = client.front.inference.tokenizing.quota
            first, second = (asyncio.ensure_future(client.stub.Tokenize(TEXT)) for _ in range(2))
            await until(lambda: engine.tokenizer.texts and quota.used.total() == 2 * TEXT.ByteSize())
            second.cancel()
            await asyncio.wait({second})
            counted = quota.used.total()
            engine.tokenizer.go.set()
            await first
            await until(lambda: not quota.used)
            return counted

    assert asyncio.run(scenario()) == 2 * TEXT.ByteSize()
