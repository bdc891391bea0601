"""Combination of the messages of GenerateUploadStream, which has the prompt in pieces, into one request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.bounds import UPLOAD
from starling.engine_ext.serving.grpc.arrivals import SlowMessageError, arriving
from starling.engine_ext.serving.grpc.messages import UploadMemoryError
from starling.engine_ext.serving.grpc.prompt_inputs import PromptLimit
from starling.engine_ext.serving.grpc.server_options import MAX_REQUEST_BYTES
from starling.v1 import inference_pb2 as pb


class Quota:
    """Limits of the bytes that all clients together, and one client alone, may use.

    Args:
        total: bytes of all clients.
        of_client: bytes of one client.
        make_error: makes the exception of a refusal. Room may be free again later.
    """

    def __init__(self, total: int, of_client: int, make_error: Callable[[], Exception]) -> None:
        self.total = total
        self.of_client = of_client
        self.make_error = make_error
        self.used: Counter[str] = Counter()

    @contextmanager
    def room(self, client: str) -> Iterator[Room]:
        """Yield room for a client's data, and release it at the end.

        Args:
            client: name of the client.
        """
        room = Room(self, client)
        try:
            yield room
        finally:
            self.used[client] -= room.size
            self.used += Counter()  # drops clients that use nothing


class Room:
    """The part of a quota that one call uses, in bytes."""

    def __init__(self, quota: Quota, client: str) -> None:
        self.quota = quota
        self.client = client
        self.size = 0

    def take(self, size: int) -> None:
        """Use ``size`` bytes more.

        Raises:
            Exception: the quota's error if there is no room.
        """
        quota = self.quota
        if quota.used[self.client] + size > quota.of_client or quota.used.total() + size > quota.total:
            raise quota.make_error()
        quota.used[self.client] += size
        self.size += size


MIN_UPLOAD_BYTES = 512 * 2**20
IDLE_SECONDS, ALL_SECONDS = 60.0, 600.0  # between two messages, and for all of them
PIECES = ("text", "token_ids")

# What a piece becomes in memory until the engine has the prompt.
ID_BYTES = 48  # in the message, as it grows, and as a number of a list
CHARACTER_BYTES = 8  # in a piece, and in the whole text
PIECE_BYTES = 64  # of a piece, however short


def upload_quota(max_model_len: int) -> Quota:
    """Return the quota of all prompts that are being uploaded; a client's half has room for any prompt of ids.

    Args:
        max_model_len: length of the model's context in tokens.
    """
    total = max(MIN_UPLOAD_BYTES, 2 * (max_model_len * ID_BYTES + 2 * MAX_REQUEST_BYTES))
    return Quota(total, total // 2, UploadMemoryError)


async def messages(parts: AsyncIterator[Any], seconds: float, all_seconds: float) -> AsyncIterator[Any]:
    """Yield the messages of a stream.

    Raises:
        SlowMessageError: the next one did not arrive within ``seconds``, or the last one within ``all_seconds``.
    """
    deadline = asyncio.get_running_loop().time() + all_seconds
    while True:
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise SlowMessageError(f"the upload did not come to its end within {all_seconds:.0f} s")
        try:
            part = await arriving(anext(parts), min(seconds, left))
        except StopAsyncIteration:
            return
        yield part


class Upload:
    """One prompt that is being uploaded.

    Args:
        room: memory for the prompt; its owner releases it.
        limit: the longest prompt.
    """

    def __init__(self, room: Room, limit: PromptLimit) -> None:
        self.room = room
        self.limit = limit
        self.kind = ""
        self.characters = 0
        self.num_pieces = 0
        self.texts: list[str] = []
        self.request = pb.GenerateStreamRequest()

    async def receive(self, parts: AsyncIterator[pb.GenerateUploadStreamRequest]) -> pb.GenerateStreamRequest:
        """Return the request, once the client has sent all of it.

        Raises:
            VLLMValidationError: parts are out of order, too many or of several kinds, or the prompt is longer than any
                can be.
            UploadMemoryError: there is no room for it beside others.
            SlowMessageError: the next part, or the last one, did not arrive in time.
        """
        self.room.take(2 * MAX_REQUEST_BYTES)  # for the head, and the message that is arriving
        first = True
        async for part in messages(parts, IDLE_SECONDS, ALL_SECONDS):
            kind = part.WhichOneof("part")
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
            self.texts.clear()
        return self.request

    def _begin(self, head: pb.GenerateStreamRequest) -> None:
        self.kind = head.WhichOneof("prompt") or ""
        if self.kind not in ("", *PIECES):
            reason = "it has no pieces; send it with GenerateStream"
            raise VLLMValidationError(f"{self.kind} is refused in an upload: {reason}", parameter=self.kind)
        self._reserve(head)
        self.request = head
        if self.kind == "text":
            self.texts.append(head.text)

    def _add(self, kind: str | None, part: pb.GenerateUploadStreamRequest) -> None:
        if kind not in PIECES or self.kind not in ("", kind):
            reason = f"the pieces of a prompt are all {self.kind}" if self.kind else f"a piece is {' or '.join(PIECES)}"
            raise VLLMValidationError(f"{kind or 'an empty part'} is refused: {reason}", parameter=kind)
        self.num_pieces += 1
        UPLOAD.check(self.num_pieces)  # the event loop takes each, also an empty one, and all clients wait for it
        self.kind = kind
        if not (part.text or part.token_ids.ids):
            return
        self._reserve(part)
        if kind == "text":
            self.texts.append(part.text)
        else:
            self.request.token_ids.MergeFrom(part.token_ids)

    def _reserve(self, part: pb.GenerateStreamRequest | pb.GenerateUploadStreamRequest) -> None:
        """Check the prompt's length with a part's piece, and take room for the piece."""
        if self.kind == "text":
            self.characters += len(part.text)
            self.limit.check_characters(self.characters)
            self.room.take(PIECE_BYTES + len(part.text) * CHARACTER_BYTES)
        elif self.kind == "token_ids":
            num_ids = len(part.token_ids.ids)
            self.limit.check_ids(len(self.request.token_ids.ids) + num_ids)
            self.room.take(num_ids * ID_BYTES)


def as_upload_event(event: pb.GenerateStreamResponse) -> pb.GenerateUploadStreamResponse:
    """Return the same event as a message of GenerateUploadStream."""
    kind = event.WhichOneof("event")
    return pb.GenerateUploadStreamResponse(**{kind: getattr(event, kind)})
