"""Progress of a prompt in a gRPC stream, before the first event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starling.engine_ext.front.progress import Progress
from starling.v1 import inference_pb2 as pb

Events = AsyncGenerator[pb.GenerateStreamResponse]


def progress_event(progress: Progress) -> pb.GenerateStreamResponse:
    """Return a prompt's progress as an event of the stream."""
    return pb.GenerateStreamResponse(
        progress=pb.Progress(
            computed_tokens=progress.computed,
            prompt_tokens=progress.prompt,
            cached_tokens=progress.cached or 0,
            context_tokens=progress.context,
            star_blocks_done=progress.star_blocks_done,
            star_blocks=progress.star_blocks,
        )
    )


async def with_progress(events: Events, updates: AsyncGenerator[Progress, None]) -> Events:
    """Yield the prompt's progress until the first event of a stream, then the stream's events.

    Closing this generator closes both others: closing ``events`` ends the request in the engine.

    Args:
        events: events of the stream.
        updates: the prompt's progress, as ProgressPoller.watch yields it.
    """
    async with aclosing(events), aclosing(updates):
        first = asyncio.ensure_future(anext(events))
        update = asyncio.ensure_future(anext(updates))
        try:
            while not first.done():
                await asyncio.wait({first, update}, return_when=asyncio.FIRST_COMPLETED)
                if not update.done():
                    continue
                if update.exception() is not None:  # the updates have ended
                    await asyncio.wait({first})
                elif not first.done():
                    yield progress_event(update.result())
                    update = asyncio.ensure_future(anext(updates))
        finally:
            # A generator can't be closed while it runs.
            for task in (first, update):
                task.cancel()
                await asyncio.wait({task})
            if not update.cancelled():
                update.exception()  # asyncio logs an exception that nothing has retrieved
        with contextlib.suppress(StopAsyncIteration):
            yield first.result()
        async for event in events:
            yield event
