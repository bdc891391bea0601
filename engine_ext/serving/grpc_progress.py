"""Puts a prompt's progress before the first event of a gRPC stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from engine_ext.serving.progress import Progress
from starling.v1 import inference_pb2 as pb

Events = AsyncGenerator[pb.GenerateStreamResponse]


def progress_event(progress: Progress) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        progress=pb.Progress(
            computed_tokens=progress.computed,
            prompt_tokens=progress.prompt,
            cached_tokens=progress.cached,
            context_tokens=progress.context,
            star_blocks_done=progress.star_blocks_done,
            star_blocks=progress.star_blocks,
        )
    )


async def with_progress(events: Events, news: AsyncGenerator[Progress, None]) -> Events:
    """The events of a stream, and before the first of them what ``news`` has to tell.

    Both generators are closed when this one is: closing ``events`` ends the request in the engine.
    """
    async with aclosing(events), aclosing(news):
        first = asyncio.ensure_future(anext(events))
        coming = asyncio.ensure_future(anext(news))
        try:
            while not first.done():
                await asyncio.wait({first, coming}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    continue
                if coming.exception() is not None:  # it has ended: what is left is the first event
                    await asyncio.wait({first})
                elif not first.done():
                    yield progress_event(coming.result())
                    coming = asyncio.ensure_future(anext(news))
        finally:
            # A generator can't be closed while it runs.
            for task in (first, coming):
                task.cancel()
                await asyncio.wait({task})
            if not coming.cancelled():
                coming.exception()  # looked at, or asyncio reports it as lost
        with contextlib.suppress(StopAsyncIteration):
            yield first.result()
        async for event in events:
            yield event
