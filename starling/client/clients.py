"""The blocking and the asyncio client. Their base class makes the channel and starts calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar, Unpack

import grpc
import grpc.aio

from starling.client.channel import SERVICE, EarlyStatus, Pem, channel_credentials, channel_options
from starling.client.errors import converted
from starling.client.replies import Capabilities, Completion, Event, Tokens, WarmedDocument, read, read_event
from starling.client.requests import (
    GenerateFields,
    Message,
    Prompt,
    Star,
    StreamFields,
    generate_request,
    tokenize_request,
    upload_parts,
    warm_request,
)
from starling.reply import Reply
from starling.v1 import inference_pb2 as pb
from starling.v1.inference_pb2_grpc import InferenceServiceStub

SERVER_MESSAGE_BYTES = 8 * 2**20
"""The largest message that a server takes. Messages and texts can't be uploaded in pieces, and may use all of it."""

PROBE = "/grpc.health.v1.Health/Check"
PROBE_SECONDS = 1.0
"""Seconds of the call that finds out, behind a deadline, whether there is a server. It is not retried."""

T = TypeVar("T")


class Connection:
    """A channel and the calls of InferenceService on it. Tasks, or threads of a blocking client, can share one."""

    library: Any  # grpc or grpc.aio: both have the same functions that make channels

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool | Pem | None = None,
        certificate: tuple[Pem, Pem] | None = None,
        retries: int = 4,
        max_message_bytes: int = 4 * 2**20,
    ) -> None:
        """Make the channel and the stubs of its calls.

        Args:
            address: host:port.
            api_key: the server's --api-key.
            tls: certificates of the trusted authorities, as PEM, or True for the system's. Default: plain text.
            certificate: the client's own chain and key, as PEM, for mTLS.
            retries: number of times that gRPC retries a call that an overloaded or unavailable server has not begun to
                answer, 0 to 4.
            max_message_bytes: size above which a request is uploaded in pieces. The server accepts messages of up to
                GetCapabilities' max_request_bytes. The size of its responses has no limit.

        Raises:
            ValueError: ``retries`` is out of its range, the key is not ASCII, or the address is a URL.
        """
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key is refused: gRPC sends printable ASCII only. Allowed: a key of such characters.")
        if address.startswith(("http://", "https://")):
            raise ValueError(f"address={address!r} is refused: it is a URL. Allowed: HOST:PORT.")
        self.address = address
        self.max_message_bytes = max_message_bytes
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        options = channel_options(retries)
        credentials = channel_credentials(tls, certificate)
        if credentials is None:
            self.channel = self.library.insecure_channel(address, options)
        else:
            self.channel = self.library.secure_channel(address, credentials, options)
        self._stub = InferenceServiceStub(self.channel)
        # GenerateRequest has the fields of GenerateStreamRequest (tests/unit/engine_ext/serving/grpc/test_client.py).
        self._generate = self.channel.unary_unary(
            f"/{SERVICE}/Generate",
            request_serializer=pb.GenerateStreamRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        self._probe = self.channel.unary_unary(PROBE)

    def _request(
        self,
        prompt: Prompt | None,
        messages: Sequence[Message] | None,
        star: Star | None,
        fields: Mapping[str, Any],
        upload: bool,
        without: Sequence[str] = (),
    ) -> tuple[pb.GenerateStreamRequest, bool]:
        """Return the request, and whether to upload it in pieces.

        Args:
            upload: True if the caller wants that also for a small request.
            without: fields that the call does not have.

        Raises:
            TypeError, ValueError: the same as ``generate_request``; or the request would have to be uploaded, and its
                prompt is messages or texts.
        """
        given = fields if star is None else {**fields, "star": star}
        request = generate_request(prompt, given, messages=messages, without=without)
        size, limit = request.ByteSize(), self.max_message_bytes
        whole = {"chat": "messages", "texts": "several texts"}.get(request.WhichOneof("prompt"))
        if whole is not None:
            limit = max(limit, SERVER_MESSAGE_BYTES)
        if not upload and size <= limit:
            return request, False
        if whole is not None:
            reason = f"{whole} can't be uploaded in pieces, and these take {size} bytes"
            allowed = f"up to {limit}"
            raise ValueError(f"The prompt is refused: {reason}. Allowed: {allowed}.")
        return request, True

    def _start(self, request: pb.GenerateStreamRequest, upload: bool, timeout: float | None) -> Any:
        if upload:
            return self._stub.GenerateUploadStream(upload_parts(request), timeout=timeout, metadata=self.metadata)
        return self._stub.GenerateStream(request, timeout=timeout, metadata=self.metadata)

    def _start_warming(
        self,
        documents: Sequence[str],
        head: str,
        concurrency: int,
        cache_salt: str | None,
        segments: str | None,
        timeout: float | None,
    ) -> Callable[[], Any]:
        request = warm_request(documents, head, concurrency, cache_salt, segments)
        return lambda: self._stub.WarmDocuments(request, timeout=timeout, metadata=self.metadata)


class Client(Connection):
    """The blocking client.

    Every method raises StarlingError where a call fails, and TypeError or ValueError for arguments of which no request
    can be made. Every ``timeout`` is in seconds, for the whole call with its retries; by default there is none.
    """

    library = grpc

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        star: Star | None = None,
        timeout: float | None = None,
        upload: bool = False,
        **fields: Unpack[StreamFields],
    ) -> Generator[Event, None, None]:
        """Generate, and yield the events of the stream: Delta, Final, Progress, PromptLogprobs.

        The call starts when the first event is requested. It ends with the iterator: at the iterator's end, at its
        ``close()``, or when a loop that holds the only reference is left.

        Args:
            prompt: text, texts that are tokenised one by one, or token ids.
            messages: a chat, in place of the prompt: messages with ``role`` and ``content``.
            star: Star Attention's options: "on", ``{"mode": "on", "block_size": 4096}`` or starling.StarOptions.
            upload: send the prompt in pieces, even a short one.
            fields: sampling parameters by vLLM's names; star options under their flat names; request_id, cache_salt,
                priority, lora_name, session_id, progress; for messages add_generation_prompt. None: not given.
        """
        request, in_pieces = self._request(prompt, messages, star, fields, upload)
        return self._events(lambda: self._start(request, in_pieces, timeout), read_event)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        star: Star | None = None,
        timeout: float | None = None,
        upload: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Completion:
        """Generate, and return the whole output in one response; the arguments are those of ``stream``."""
        request, in_pieces = self._request(prompt, messages, star, fields, upload, without=("progress",))
        if not in_pieces:
            return read(self._call(self._generate, request, timeout))
        reply = Reply()
        for event in self._events(lambda: self._start(request, True, timeout), as_it_is):
            reply.add(event)
        return read(reply.response())

    def warm_documents(
        self,
        documents: Sequence[str],
        *,
        head: str = "",
        concurrency: int = 1,
        cache_salt: str | None = None,
        segments: str | None = None,
        timeout: float | None = None,
    ) -> Generator[WarmedDocument, None, None]:
        """Have documents computed, so that they are in the server's library; yields what became of each.

        Args:
            documents: texts, up to 256.
            head: the text before the documents in every prompt.
            concurrency: number of documents at the same time, up to 8.
            cache_salt: salt of the prompts that find the documents.
            segments: form of the documents in your requests: "auto" (messages of a chat), the text of the token that
                starts each, or "texts". Default: the server's --star-segments, or texts where it has none.
        """
        return self._events(self._start_warming(documents, head, concurrency, cache_salt, segments, timeout), read)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        add_generation_prompt: bool | None = None,
    ) -> Tokens:
        """Return the token ids of a text or of messages, by the model's tokenizer."""
        return read(self._call(self._stub.Tokenize, tokenize_request(prompt, messages, add_generation_prompt), timeout))

    def capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """Return what the server supports, and its limits."""
        return read(self._call(self._stub.GetCapabilities, pb.GetCapabilitiesRequest(), timeout))

    def close(self) -> None:
        """Close the connection. This ends running calls."""
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise converted(error, self.address, self._probed(error)) from error

    def _events(self, start: Callable[[], Any], convert: Callable[[Any], T | None]) -> Generator[T, None, None]:
        call = start()
        try:
            for message in call:
                if (event := convert(message)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise converted(error, self.address, self._probed(error)) from error
        finally:
            call.cancel()

    def _probed(self, error: Any) -> Any:
        """Return the error of a further call, where one that met its deadline leaves open whether there is a server."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            try:
                self._probe(b"", timeout=PROBE_SECONDS)
            except grpc.RpcError as probed:
                return probed
        return error


class AsyncClient(Connection):
    """The asyncio client: it has the methods of Client, to await or iterate over. Make it where the loop runs."""

    library = grpc.aio

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        star: Star | None = None,
        timeout: float | None = None,
        upload: bool = False,
        **fields: Unpack[StreamFields],
    ) -> AsyncGenerator[Event, None]:
        """Stream as Client.stream.

        ``aclose()`` ends the call at once; leaving a loop ends it in asyncio's next iteration.
        """
        request, in_pieces = self._request(prompt, messages, star, fields, upload)
        return self._events(lambda: self._start(request, in_pieces, timeout), read_event)

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        star: Star | None = None,
        timeout: float | None = None,
        upload: bool = False,
        **fields: Unpack[GenerateFields],
    ) -> Completion:
        """Generate as Client.generate."""
        request, in_pieces = self._request(prompt, messages, star, fields, upload, without=("progress",))
        if not in_pieces:
            return read(await self._call(self._generate, request, timeout))
        reply = Reply()
        async for event in self._events(lambda: self._start(request, True, timeout), as_it_is):
            reply.add(event)
        return read(reply.response())

    def warm_documents(
        self,
        documents: Sequence[str],
        *,
        head: str = "",
        concurrency: int = 1,
        cache_salt: str | None = None,
        segments: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[WarmedDocument, None]:
        """Warm documents as Client.warm_documents."""
        return self._events(self._start_warming(documents, head, concurrency, cache_salt, segments, timeout), read)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        add_generation_prompt: bool | None = None,
    ) -> Tokens:
        """Tokenize as Client.tokenize."""
        request = tokenize_request(prompt, messages, add_generation_prompt)
        return read(await self._call(self._stub.Tokenize, request, timeout))

    async def capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """Return the same as Client.capabilities."""
        return read(await self._call(self._stub.GetCapabilities, pb.GetCapabilitiesRequest(), timeout))

    async def close(self) -> None:
        """Close the connection as Client.close."""
        await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise converted(error, self.address, await self._probed(error)) from error

    async def _events(self, start: Callable[[], Any], convert: Callable[[Any], T | None]) -> AsyncGenerator[T, None]:
        call = start()
        status = EarlyStatus(call)
        try:
            async for message in call:
                if (event := convert(message)) is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            known = await status.of(error)
            if known is not error:
                known.__cause__ = error
            raise converted(known, self.address, await self._probed(known)) from known
        finally:
            call.cancel()

    async def _probed(self, error: Any) -> Any:
        """Return the same as Client._probed."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            try:
                await self._probe(b"", timeout=PROBE_SECONDS)
            except grpc.RpcError as probed:
                return probed
        return error


def as_it_is(message: T) -> T:
    """Return the message itself, for Reply."""
    return message
