"""WarmDocuments: which requests it makes, what it says of each document, and what it refuses."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from starling.client import AsyncClient, StarlingError, WarmedDocument
from starling.config.star import parse_options
from starling.engine_ext.front.call import current_call
from starling.engine_ext.serving.grpc.messages import DrainingError
from starling.features.front_request import empty_output
from starling.scheduler.planning.facts import EngineFacts
from starling.scheduler.planning.request_metadata import LIBRARY_CONNECTOR
from tests.unit.engine_ext.serving.grpc.fakes import PROMPT_TOKENS, FakeEngine, front_of, until

TEN = PROMPT_TOKENS  # of each text


class Engine(FakeEngine):
    """Notes the star options and the salt of each request; a document "long" makes too many tokens.

    Attributes:
        looked_up: the number of tokens of each prompt that was looked up.
        finds: cached tokens of each document of such a prompt.
    """

    def __init__(self, *script: Any, segments: str = "off", finds: int = TEN, **kwargs: Any) -> None:
        super().__init__(*script, **kwargs)
        self.sent: list[tuple[int, dict[str, Any], str | None]] = []
        self.looked_up: list[int] = []
        self.finds = finds
        self.planner.defaults = parse_options({"star_segments": segments})
        self.vllm_config.kv_transfer_config = SimpleNamespace(kv_connector=LIBRARY_CONNECTOR)

    async def render_cmpl_async(self, prompts, tok_params, prompt_extras):
        def number_of(prompt: Any) -> int:
            if "prompt_token_ids" in prompt:
                return len(prompt["prompt_token_ids"])
            return 2 * self.model_config.max_model_len if prompt["prompt"] == "long" else TEN

        return [
            {"type": "token", "prompt_token_ids": [1] * number_of(each), **(prompt_extras or {})} for each in prompts
        ]

    async def generate(self, prompt, params, request_id, priority, lora_request, trace_headers=None):
        call = current_call.get()
        if call is not None and call.only_looks_up:
            self.looked_up.append(len(prompt["prompt_token_ids"]))
            block = {"tokens": TEN, "cached_tokens": self.finds}
            call.cached = {"plan": {}, "replicas": [{"documents": [block, block]}]}
            yield empty_output(request_id, prompt["prompt_token_ids"], 1, "stop")
            return
        star = {name: value for name, value in (params.extra_args or {}).items() if name.startswith("star")}
        self.sent.append((len(prompt["prompt_token_ids"]), star, prompt.get("cache_salt")))
        async for event in super().generate(prompt, params, request_id, priority, lora_request):
            yield event


def warm(engine: FakeEngine, documents: list[str], **fields: Any) -> list[WarmedDocument]:
    """What the client yields."""

    async def scenario() -> list[WarmedDocument]:
        async with front_of(engine) as front, AsyncClient(front.address, retries=0) as client:
            return [done async for done in client.warm_documents(documents, **fields)]

    return asyncio.run(asyncio.wait_for(scenario(), 300))


def test_each_document_is_a_request_behind_the_head_and_a_last_one_lets_their_pages_be_stored() -> None:
    engine = Engine("a")
    done = warm(engine, ["one", "two"], head="You answer.", cache_salt="mine")
    assert [(each.index, each.tokens, each.error) for each in done] == [(0, TEN, ""), (1, TEN, "")]
    assert not any(each.source for each in done), "a fake engine says nothing of its documents"
    document = (3 * TEN, {"star": "on"}, "mine")
    assert engine.sent == [document, document, (TEN, {"star": "off"}, "mine")]
    assert [call.params.max_tokens for call in engine.calls] == [1, 1, 2]
    assert engine.looked_up == [4 * TEN] * 2, "with another document and another question"


@pytest.mark.parametrize("segments", ["auto", "<sep>"])
def test_requests_are_those_of_the_server(segments: str) -> None:
    """A prompt of text, which a fake engine's chat is too, has TEN tokens."""
    engine = Engine("a", segments=segments)
    warm(engine, ["one"], head="You answer.")
    assert engine.sent[0] == (TEN, {"star": "on", "star_segments": segments}, None)
    warm(engine, ["one"], head="You answer.", segments="texts")
    assert engine.sent[2] == (3 * TEN, {"star": "on"}, None)


def test_a_document_that_another_prompt_does_not_find_is_an_error() -> None:
    (done,) = warm(Engine("a", finds=4), ["one"], head="You answer.")
    assert done.error == f"another prompt finds only 4 of its {TEN} tokens"
    assert not done.tokens


def test_a_document_that_is_refused_is_named_and_the_others_go_on() -> None:
    done = warm(Engine("a", max_model_len=100), ["one", "long", "two", "x" * 1_000_001], head="You answer.")
    assert [bool(each.error) for each in sorted(done, key=lambda each: each.index)] == [False, True, False, True]
    assert "100" in done[1].error and "characters" in done[3].error


def test_so_many_documents_are_computed_at_once() -> None:
    """All of them wait in the engine; with one more at a time a fifth would run."""

    async def scenario() -> int:
        engine = Engine(None, "a")
        async with front_of(engine) as front, AsyncClient(front.address, retries=0) as client:
            documents = client.warm_documents(list("abcdef"), head="You answer.", concurrency=4)
            first = asyncio.ensure_future(anext(documents))
            await until(lambda: len(engine.calls) >= 4)
            running = len(engine.calls) - len(engine.ended)
            engine.release.set()
            await first
            assert len([each async for each in documents]) == 5
            return running

    assert asyncio.run(scenario()) == 4


def test_the_requests_end_with_the_call() -> None:
    async def scenario() -> None:
        engine = Engine(None, "a")
        async with front_of(engine) as front, AsyncClient(front.address, retries=0) as client:
            documents = client.warm_documents(list("abcdef"), head="You answer.", concurrency=3)
            first = asyncio.ensure_future(anext(documents))
            await until(lambda: len(engine.calls) >= 3)
            first.cancel()
            await until(lambda: len(engine.ended) >= 3)
            assert len(engine.calls) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("documents", "fields", "says"),
    [
        ([], {}, "There are no documents"),
        (["a"] * 257, {}, "it has 257 documents, and may have 256 at most"),
        (["a"], {"concurrency": 9}, "it has 9 documents, and may have 8 at most"),
        (["a"], {"head": "x" * 1_000_001}, "characters"),
        (["a"], {"head": ""}, "head is empty: the first text of a prompt of texts is its head"),
        (["a"], {"head": "", "segments": "auto"}, "head is empty: the first message of a chat is its head"),
    ],
    ids=["none", "too many", "too many at once", "the head is too long", "texts without a head", "a chat without one"],
)
def test_what_is_refused(documents: list[str], fields: dict[str, Any], says: str) -> None:
    engine = Engine("a", max_model_len=100) if "head" in fields else Engine("a")
    with pytest.raises(StarlingError, match=says) as failed:
        warm(engine, documents, **fields)
    assert failed.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert not engine.sent


def test_an_engine_without_star_computes_no_documents() -> None:
    engine = Engine("a")
    engine.planner.facts = EngineFacts(32, refusals=("MLA models",))
    with pytest.raises(StarlingError, match="WarmDocuments is refused: MLA models"):
        warm(engine, ["one"], head="You answer.")
    assert not engine.sent


def test_an_engine_without_a_library_keeps_no_documents() -> None:
    engine = Engine("a")
    engine.vllm_config.kv_transfer_config = None
    with pytest.raises(StarlingError, match=r"WarmDocuments is refused: the server has no library \(--star-library\)"):
        warm(engine, ["one"], head="You answer.")
    assert not engine.sent


def test_a_full_queue_ends_the_call() -> None:
    with pytest.raises(StarlingError) as failed:
        warm(Engine("a", refuses=DrainingError("no more")), ["one"], head="You answer.")
    assert failed.value.code is grpc.StatusCode.UNAVAILABLE


def test_one_text_is_no_list_of_documents() -> None:
    with pytest.raises(TypeError, match="it is one text"):
        warm(Engine("a"), "one")  # type: ignore[arg-type]
