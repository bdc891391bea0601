"""Combines the messages of GenerateUploadStream, which has the prompt in pieces, into one request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from vllm.exceptions import VLLMValidationError

from engine_ext.serving.errors import UploadMemoryError
from starling.v1 import inference_pb2 as pb

MAX_UPLOAD_BYTES = 256 * 2**20  # some 60 million token ids
PIECES = ("text", "token_ids")


class UploadMemory:
    """Limits the bytes of all prompts that are being uploaded: a slow client's prompt stays in memory until it ends.

    Args:
        total: bytes of all uploads together, and so of one.
    """

    def __init__(self, total: int = MAX_UPLOAD_BYTES) -> None:
        self.total = total
        self.used = 0

    @contextmanager
    def upload(self) -> Iterator[Upload]:
        """An upload, whose memory is released at the end."""
        upload = Upload(self)
        try:
            yield upload
        finally:
            self.used -= upload.size


class Upload:
    """One prompt that is being uploaded."""

    def __init__(self, memory: UploadMemory) -> None:
        self.memory = memory
        self.size = 0
        self.kind = ""
        self.texts: list[str] = []
        self.request = pb.GenerateStreamRequest()

    async def receive(self, parts: AsyncIterator[pb.GenerateUploadStreamRequest]) -> pb.GenerateStreamRequest:
        """The request, once the client has sent all of it.

        Raises:
            VLLMValidationError: parts are out of order or of several kinds, or larger than any upload may be.
            UploadMemoryError: other uploads use the memory.
        """
        first = True
        async for part in parts:
            kind = part.WhichOneof("part")
            self._reserve(part.ByteSize(), kind)
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

    def _reserve(self, size: int, kind: str | None) -> None:
        if self.size + size > self.memory.total:
            reason = f"an upload has at most {self.memory.total} bytes (GetCapabilities: max_upload_bytes)"
            raise VLLMValidationError(f"The prompt is too long: {reason}.", parameter=kind)
        if self.memory.used + size > self.memory.total:
            raise UploadMemoryError
        self.size += size
        self.memory.used += size

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
    """The same event as a message of GenerateUploadStream."""
    kind = event.WhichOneof("event")
    return pb.GenerateUploadStreamResponse(**{kind: getattr(event, kind)})
