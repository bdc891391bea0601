"""What a stream comes to: the server answers Generate with it, the client makes it of a prompt that it uploads."""

from __future__ import annotations

from starling.v1 import inference_pb2 as pb


class Reply:
    """The events of a stream, added up to the one reply of Generate."""

    def __init__(self) -> None:
        self.texts: dict[int, list[str]] = {}
        self.choices: dict[int, pb.Choice] = {}
        self.response = pb.GenerateResponse()

    def add(self, event: pb.GenerateStreamResponse) -> None:
        kind = event.WhichOneof("event")
        if kind == "delta":
            self._add_delta(event.delta)
        elif kind == "final":
            self._add_final(event.final)
        elif kind == "prompt_logprobs":
            self.response.prompt_logprobs.CopyFrom(event.prompt_logprobs)

    def _choice(self, index: int) -> pb.Choice:
        return self.choices.setdefault(index, pb.Choice(index=index))

    def _add_delta(self, new: pb.Delta) -> None:
        choice = self._choice(new.index)
        self.texts.setdefault(new.index, []).append(new.text)
        choice.token_ids.extend(new.token_ids)
        choice.logprobs.extend(new.logprobs)

    def _add_final(self, end: pb.Final) -> None:
        choice = self._choice(end.index)
        choice.finish_reason = end.finish_reason
        reason = end.WhichOneof("stop_reason")
        if reason is not None:
            setattr(choice, reason, getattr(end, reason))
        self.response.plan.CopyFrom(end.plan)
        for field in pb.Usage.DESCRIPTOR.fields_by_name:
            total = getattr(self.response.usage, field) + getattr(end.usage, field)
            setattr(self.response.usage, field, total)

    def whole(self) -> pb.GenerateResponse:
        for index, choice in sorted(self.choices.items()):
            choice.text = "".join(self.texts.get(index, ()))
            self.response.choices.append(choice)
        return self.response
