"""Combines the events of a stream into the response of Generate, in the server and in the Python client."""

from __future__ import annotations

from starling.v1 import inference_pb2 as pb


class Reply:
    """Collects the events of one stream."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._choices: dict[int, pb.Choice] = {}
        self._response = pb.GenerateResponse()

    def add(self, event: pb.GenerateStreamResponse) -> None:
        """Add the stream's next event. Progress events are not part of the response."""
        kind = event.WhichOneof("event")
        if kind == "delta":
            self._add_delta(event.delta)
        elif kind == "final":
            self._add_final(event.final)
        elif kind == "prompt_logprobs":
            self._response.prompt_logprobs.CopyFrom(event.prompt_logprobs)

    def _choice(self, index: int) -> pb.Choice:
        return self._choices.setdefault(index, pb.Choice(index=index))

    def _add_delta(self, delta: pb.Delta) -> None:
        choice = self._choice(delta.index)
        self._texts.setdefault(delta.index, []).append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs)

    def _add_final(self, final: pb.Final) -> None:
        choice = self._choice(final.index)
        choice.finish_reason = final.finish_reason
        reason = final.WhichOneof("stop_reason")
        if reason is not None:
            setattr(choice, reason, getattr(final, reason))
        self._response.plan.CopyFrom(final.plan)
        for field in pb.Usage.DESCRIPTOR.fields_by_name:
            total = getattr(self._response.usage, field) + getattr(final.usage, field)
            setattr(self._response.usage, field, total)

    def response(self) -> pb.GenerateResponse:
        """Return the response, its choices in the order of their indices. Call this once, after the last event."""
        for index, choice in sorted(self._choices.items()):
            choice.text = "".join(self._texts.get(index, ()))
            self._response.choices.append(choice)
        return self._response
