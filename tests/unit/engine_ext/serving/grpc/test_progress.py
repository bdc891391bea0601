"""Progress before the first event of a stream: order, ends, errors, and that nothing is left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from starling.engine_ext.front.progress import Progress
from starling.engine_ext.serving.grpc.outputs import with_progress
from starling.v1 import inference_pb2 as pb


class Script:
    """An async generator over items: an asyncio.Event is waited for, an exception raised, the rest yielded."""

    def __init__(self, *items) -> None:
        self.items = items
        self.closed = False

    async def run(self) -> AsyncGenerator:
        try:
            for item in self.items:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
                await asyncio.sleep(0)
        finally:
            self.closed = True


def delta(text: str) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(delta=pb.Delta(text=text))


def progress(computed: int) -> Progress:
    return Progress(computed, 100, 0, 80, computed // 20, 4)


def shown(event: pb.GenerateStreamResponse):
    return event.progress.computed_tokens if event.HasField("progress") else event.delta.text


async def collect(events: Script, updates: Script, on_event=lambda event: None) -> list:
    seen = []
    async for event in with_progress(events.run(), updates.run()):
        seen.append(shown(event))
        on_event(seen[-1])
    assert events.closed and updates.closed
    return seen


def run(script) -> None:
    async def main():
        before = asyncio.all_tasks()
        await script()
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(main(), 300))


def test_progress_comes_first_and_ends_with_the_first_event():
    async def script():
        prefilled, never = asyncio.Event(), asyncio.Event()
        events = Script(prefilled, delta("a"), delta("b"))
        updates = Script(progress(20), progress(60), never, progress(100))
        assert await collect(events, updates, lambda item: item == 60 and prefilled.set()) == [20, 60, "a", "b"]

    run(script)


def test_updates_may_end_before_the_first_event():
    async def script():
        prefilled = asyncio.Event()
        events, updates = Script(prefilled, delta("a")), Script(progress(20))
        assert await collect(events, updates, lambda item: prefilled.set()) == [20, "a"]
        assert await collect(Script(delta("a")), Script()) == ["a"]
        assert await collect(Script(), Script()) == []

    run(script)


def test_an_error_of_the_request_comes_through():
    async def script():
        events, updates = Script(asyncio.Event(), ValueError("bad")), Script(progress(20), asyncio.Event())
        events.items[0].set()
        with pytest.raises(ValueError, match="bad"):
            await collect(events, updates)
        assert events.closed and updates.closed

    run(script)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_client_that_leaves_during_prefill_ends_both(how):
    async def script():
        events, updates = Script(asyncio.Event(), delta("a")), Script(progress(20), asyncio.Event())
        stream = with_progress(events.run(), updates.run())
        assert shown(await anext(stream)) == 20
        if how == "cancel":
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await stream.aclose()
        assert events.closed and updates.closed

    run(script)
