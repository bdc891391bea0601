"""Conversion of vLLM's outputs, and of a prompt's progress between them, to messages of starling.v1."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput

from starling.engine_ext.front.progress import Progress
from starling.v1 import inference_pb2 as pb

ATTENTION = {"dense": pb.Plan.ATTENTION_DENSE, "star": pb.Plan.ATTENTION_STAR}
FINISH_REASONS = {
    "stop": pb.Final.FINISH_REASON_STOP,
    "length": pb.Final.FINISH_REASON_LENGTH,
    "abort": pb.Final.FINISH_REASON_ABORT,
    "repetition": pb.Final.FINISH_REASON_REPETITION,
}

Position = Mapping[int, Logprob]
MAX_LOGPROBS = 32_768  # of one event: below 2 MiB; many clients accept at most 4 MiB


def deltas(output: CompletionOutput, top: int | None = None) -> Iterator[pb.GenerateStreamResponse]:
    """Yield the new output of a choice: one event, or several if a slow reader left many log probabilities.

    Args:
        output: vLLM's output of the choice.
        top: value of SamplingParams.logprobs, or None for no log probabilities.
    """
    token_ids = output.token_ids
    # An output without tokens has all log probabilities so far. Only as many as it has tokens are new.
    positions = [] if top is None else [position or {} for position in (output.logprobs or ())[: len(token_ids)]]
    widest = max(map(len, positions), default=0)
    tokens = max(1, MAX_LOGPROBS // widest if widest else len(token_ids))
    for start in range(0, len(token_ids) or 1, tokens):
        piece = slice(start, start + tokens)
        pairs = zip(token_ids[piece], positions[piece], strict=False)
        message = pb.Delta(
            text="" if start else output.text,
            token_ids=token_ids[piece],
            index=output.index,
            logprobs=[token_logprobs(token_id, position, top or 0) for token_id, position in pairs],
        )
        yield pb.GenerateStreamResponse(delta=message)


def token_logprobs(token_id: int, position: Position, top: int) -> pb.TokenLogprobs:
    """Return the log probabilities of the chosen and the ``top`` likeliest tokens (-1: all), or an empty message."""
    if not position:
        return pb.TokenLogprobs()
    ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
    likeliest = [pair for pair in ranked if top < 0 or 1 <= (pair[1].rank or 0) <= top]
    return pb.TokenLogprobs(chosen=logprob(token_id, position[token_id]), top=[logprob(*pair) for pair in likeliest])


def logprob(token_id: int, value: Logprob) -> pb.Logprob:
    """Return one token's log probability."""
    return pb.Logprob(token_id=token_id, logprob=value.logprob, rank=value.rank or 0, text=value.decoded_token or "")


def prompt_logprobs(
    token_ids: Sequence[int], positions: Iterable[Position | None], top: int | None
) -> pb.GenerateStreamResponse:
    """Return the log probabilities of all prompt tokens. The first one is empty, because vLLM has none for it."""
    pairs = zip(token_ids, positions, strict=True)
    tokens = [token_logprobs(token_id, position or {}, top or 0) for token_id, position in pairs]
    return pb.GenerateStreamResponse(prompt_logprobs=pb.PromptLogprobs(tokens=tokens))


def final(output: CompletionOutput, usage: pb.Usage, plan: dict[str, Any]) -> pb.GenerateStreamResponse:
    """Return the last event of a choice. ``plan`` is the prompt's plan as `PromptPlanner.describe` returns it."""
    reason = FINISH_REASONS.get(output.finish_reason or "", pb.Final.FINISH_REASON_UNSPECIFIED)
    message = pb.Final(finish_reason=reason, usage=usage, plan=plan_message(plan), index=output.index)
    if isinstance(output.stop_reason, str):
        message.stop_string = output.stop_reason
    elif output.stop_reason is not None:
        message.stop_token_id = output.stop_reason
    return pb.GenerateStreamResponse(final=message)


def plan_message(plan: dict[str, Any]) -> pb.Plan:
    """Return a described plan as a message, with the numbers of keys that the description of a dense plan omits."""
    tokens = plan["prompt_tokens"]
    pairs = tokens * (tokens + 1) // 2
    dense = {"keys_attended": pairs, "dense_keys": pairs, "keys_per_context_token": (tokens + 1) / 2}
    return pb.Plan(**dense | plan | {"attention": ATTENTION[plan["attention"]]})


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
