"""The blocking and the asyncio client. Their base class makes the channel and starts calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio

from starling.client.channel import SERVICE, Pem, channel_credentials, channel_options
from starling.client.early_status import EarlyStatus
from starling.client.errors import converted_errors
from starling.client.requests import Prompt, generate_request, tokenize_request, upload_parts, warm_request
from starling.reply import Reply
from starling.v1 import inference_pb2 as pb

SERVER_MESSAGE_BYTES = 8 * 2**20
"""The largest message that a server takes. Messages and texts can't be uploaded in pieces, and may use all of it."""

Event = pb.GenerateStreamResponse
Events = Generator[Event, None, None]
AsyncEvents = AsyncGenerator[Event, None]


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
        """
        Args:
            address: host:port.
            api_key: the server's --api-key.
            tls: certificates of the trusted authorities, as PEM; True: the system's. Default: plain text.
            certificate: the client's own chain and key, as PEM, for mTLS.
            retries: how often gRPC retries a call that an overloaded or unavailable server has not begun to answer,
                0 to 4.
            max_message_bytes: a larger request is uploaded in pieces. The server accepts messages of up to
                GetCapabilities' max_request_bytes. The size of its responses has no limit.

        Raises:
            ValueError: ``retries`` is out of its range.
        """
        self.max_message_bytes = max_message_bytes
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        options = channel_options(retries)
        credentials = channel_credentials(tls, certificate)
        if credentials is None:
            self.channel = self.library.insecure_channel(address, options)
        else:
            self.channel = self.library.secure_channel(address, credentials, options)
        # All three calls that generate use the types of GenerateStream: the messages of GenerateUploadStream and
        # Generate have the same fields (tests/unit/engine_ext/serving/grpc/test_client.py checks that).
        self._stream = self._method("unary_stream", "GenerateStream", pb.GenerateStreamRequest, Event)
        self._upload = self._method("stream_stream", "GenerateUploadStream", pb.GenerateUploadStreamRequest, Event)
        self._generate = self._method("unary_unary", "Generate", pb.GenerateStreamRequest, pb.GenerateResponse)
        self._warm = self._method("unary_stream", "WarmDocuments", pb.WarmDocumentsRequest, pb.WarmDocumentsResponse)
        self._tokenize = self._method("unary_unary", "Tokenize", pb.TokenizeRequest, pb.TokenizeResponse)
        self._capabilities = self._method(
            "unary_unary", "GetCapabilities", pb.GetCapabilitiesRequest, pb.GetCapabilitiesResponse
        )

    def _method(self, kind: str, name: str, request: Any, response: Any) -> Any:
        return getattr(self.channel, kind)(
            f"/{SERVICE}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    def _is_upload(self, request: pb.GenerateStreamRequest, upload: bool) -> bool:
        """Whether to upload a request in pieces.

        Args:
            upload: whether the caller wants that also for a small request.

        Raises:
            ValueError: the request would have to be uploaded, and its prompt is messages or texts.
        """
        size, limit = request.ByteSize(), self.max_message_bytes
        whole = {"chat": "messages", "texts": "several texts"}.get(request.WhichOneof("prompt"))
        if whole is not None:
            limit = max(limit, SERVER_MESSAGE_BYTES)
        if not upload and size <= limit:
            return False
        if whole is not None:
            reason = f"{whole} can't be uploaded in pieces, and these take {size} bytes"
            allowed = f"up to {limit}"
            raise ValueError(f"The prompt is refused: {reason}. Allowed: {allowed}.")
        return True

    def _start(self, request: pb.GenerateStreamRequest, upload: bool, timeout: float | None) -> Any:
        if upload:
            return self._upload(upload_parts(request), timeout=timeout, metadata=self.metadata)
        return self._stream(request, timeout=timeout, metadata=self.metadata)


class Client(Connection):
    """The blocking client.

    Every method raises StarlingError where a call fails, and TypeError or ValueError for arguments of which no request
    can be made. Every ``timeout`` is in seconds, for the whole call with its retries; by default there is none.
    """

    library = grpc

    def stream(self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any) -> Events:
        """Generate, and yield the events of the stream.

        The call starts when the first event is requested. It ends with the iterator: at the iterator's end, at its
        ``close()``, or when a loop that holds the only reference is left.

        Args:
            prompt: text, token ids, or messages with ``role`` and ``content``.
            upload: send the prompt in pieces, even a short one.
            fields: sampling parameters by vLLM's names; ``star``, Star Attention's options, as ``{"mode": "on",
                "block_size": 4096}`` or under their flat names; request_id, cache_salt, priority, lora_name, progress;
                for messages add_generation_prompt. None: not given.
        """
        request = generate_request(prompt, fields)
        return self._events(partial(self._start, request, self._is_upload(request, upload), timeout))

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any
    ) -> pb.GenerateResponse:
        """Generate, and return the whole output in one response. There is no ``progress``."""
        request = generate_request(prompt, fields, without=("progress",))
        if not self._is_upload(request, upload):
            return self._call(self._generate, request, timeout)
        reply = Reply()
        for event in self._events(partial(self._start, request, True, timeout)):
            reply.add(event)
        return reply.response()

    def warm_documents(
        self,
        documents: Sequence[str],
        *,
        head: str = "",
        concurrency: int = 1,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> Generator[pb.WarmDocumentsResponse]:
        """Have documents computed, so that they are in the server's library; yields what became of each.

        Args:
            documents: up to 256 texts.
            head: the text before the documents in every prompt.
            concurrency: documents at the same time, up to 8.
            cache_salt: only prompts with this salt find the documents.
        """
        request = warm_request(documents, head, concurrency, cache_salt)
        return self._events(partial(self._warm, request, timeout=timeout, metadata=self.metadata))

    def tokenize(
        self, prompt: Prompt, *, timeout: float | None = None, add_generation_prompt: bool | None = None
    ) -> pb.TokenizeResponse:
        """The token ids of a text or of messages, by the model's tokenizer."""
        return self._call(self._tokenize, tokenize_request(prompt, add_generation_prompt), timeout)

    def capabilities(self, *, timeout: float | None = None) -> pb.GetCapabilitiesResponse:
        """What the server supports, and its limits."""
        return self._call(self._capabilities, pb.GetCapabilitiesRequest(), timeout)

    def close(self) -> None:
        """Close the connection. This ends running calls."""
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        with converted_errors():
            return method(request, timeout=timeout, metadata=self.metadata)

    def _events(self, start: Callable[[], Any]) -> Generator[Any]:
        call = start()
        try:
            with converted_errors():
                yield from call
        finally:
            call.cancel()


class AsyncClient(Connection):
    """The asyncio client: it has the methods of Client, to await or iterate over. Make it where the loop runs."""

    library = grpc.aio

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any
    ) -> AsyncEvents:
        """As Client.stream. ``aclose()`` ends the call at once; leaving a loop ends it in asyncio's next iteration."""
        request = generate_request(prompt, fields)
        return self._events(partial(self._start, request, self._is_upload(request, upload), timeout))

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any
    ) -> pb.GenerateResponse:
        """As Client.generate."""
        request = generate_request(prompt, fields, without=("progress",))
        if not self._is_upload(request, upload):
            return await self._call(self._generate, request, timeout)
        reply = Reply()
        async for event in self._events(partial(self._start, request, True, timeout)):
            reply.add(event)
        return reply.response()

    def warm_documents(
        self,
        documents: Sequence[str],
        *,
        head: str = "",
        concurrency: int = 1,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[pb.WarmDocumentsResponse]:
        """As Client.warm_documents."""
        request = warm_request(documents, head, concurrency, cache_salt)
        return self._events(partial(self._warm, request, timeout=timeout, metadata=self.metadata))

    async def tokenize(
        self, prompt: Prompt, *, timeout: float | None = None, add_generation_prompt: bool | None = None
    ) -> pb.TokenizeResponse:
        """As Client.tokenize."""
        return await self._call(self._tokenize, tokenize_request(prompt, add_generation_prompt), timeout)

    async def capabilities(self, *, timeout: float | None = None) -> pb.GetCapabilitiesResponse:
        """As Client.capabilities."""
        return await self._call(self._capabilities, pb.GetCapabilitiesRequest(), timeout)

    async def close(self) -> None:
        """As Client.close."""
        await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        with converted_errors():
            return await method(request, timeout=timeout, metadata=self.metadata)

    async def _events(self, start: Callable[[], Any]) -> AsyncGenerator[Any]:
        call = start()
        status = EarlyStatus(call)
        try:
            with converted_errors():
                try:
                    async for event in call:
                        yield event
                except grpc.aio.AioRpcError as error:
                    known = await status.of(error)
                    if known is error:
                        raise
                    raise known from error
        finally:
            call.cancel()
