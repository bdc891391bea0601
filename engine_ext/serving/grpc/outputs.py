"""Conversion of vLLM's outputs to messages of starling.v1. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput

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
