"""A prompt that comes in pieces: GenerateUploadStream's messages, put together to the one request they stand for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from vllm.exceptions import VLLMValidationError

from engine_ext.serving.errors import UploadRoomError
from starling.v1 import inference_pb2 as pb

MAX_UPLOAD_BYTES = 256 * 2**20  # some 60 million token ids
PIECES = ("text", "token_ids")


class UploadRoom:
    """Bytes that prompts may take while they come in, of one and of all together: a slow client holds what it sent."""

    def __init__(self, total: int = MAX_UPLOAD_BYTES) -> None:
        self.total = total
        self.taken = 0

    @contextmanager
    def upload(self) -> Iterator[Upload]:
        upload = Upload(self)
        try:
            yield upload
        finally:
            self.taken -= upload.size


class Upload:
    """One prompt that comes in."""

    def __init__(self, room: UploadRoom) -> None:
        self.room = room
        self.size = 0
        self.kind = ""
        self.texts: list[str] = []
        self.request = pb.GenerateStreamRequest()

    async def receive(self, parts: AsyncIterator[pb.GenerateUploadStreamRequest]) -> pb.GenerateStreamRequest:
        """The request, when the client has sent all of it.

        Raises:
            VLLMValidationError: parts out of order or of several kinds, or more than can ever have room.
            UploadRoomError: other uploads take the room that is left.
        """
        first = True
        async for part in parts:
            kind = part.WhichOneof("part")
            self._take(part.ByteSize(), kind)
            if first != (kind == "head"):
                reason = "the first message of an upload is its head, and no other is"
                raise VLLMValidationError(f"{kind or 'an empty part'} is refused: {reason}", parameter="head")
            if first:
                self._begin(part.head)
            else:
                self._add(kind, part)
            first = False
        if first:
            raise VLLMValidationError("The upload is empty: it needs a head, and a prompt.", parameter="head")
        if self.texts:
            self.request.text = "".join(self.texts)
        return self.request

    def _take(self, size: int, kind: str | None) -> None:
        if self.size + size > self.room.total:
            reason = f"an upload has at most {self.room.total} bytes (GetCapabilities: max_upload_bytes)"
            raise VLLMValidationError(f"The prompt is too long: {reason}.", parameter=kind)
        if self.room.taken + size > self.room.total:
            raise UploadRoomError
        self.size += size
        self.room.taken += size

    def _begin(self, head: pb.GenerateStreamRequest) -> None:
        self.request = head
        self.kind = head.WhichOneof("prompt") or ""
        if self.kind not in ("", *PIECES):
            reason = "messages have no pieces; send them with GenerateStream"
            raise VLLMValidationError(f"{self.kind} is refused in an upload: {reason}", parameter=self.kind)
        if self.kind == "text":
            self.texts.append(head.text)

    def _add(self, kind: str | None, part: pb.GenerateUploadStreamRequest) -> None:
        if kind not in PIECES or self.kind not in ("", kind):
            reason = f"the pieces of a prompt are all {self.kind}" if self.kind else f"a piece is {' or '.join(PIECES)}"
            raise VLLMValidationError(f"{kind or 'an empty part'} is refused: {reason}", parameter=kind)
        self.kind = kind
        if kind == "text":
            self.texts.append(part.text)
        else:
            self.request.token_ids.ids.extend(part.token_ids.ids)


def as_upload_event(event: pb.GenerateStreamResponse) -> pb.GenerateUploadStreamResponse:
    """The same event, in the message that this method's stream is of."""
    kind = event.WhichOneof("event")
    return pb.GenerateUploadStreamResponse(**{kind: getattr(event, kind)})
