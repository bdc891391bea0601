"""The two clients. What they share makes the channel and starts calls; what differs is how an answer is waited for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

import grpc
import grpc.aio

from starling.client.channel import SERVICE, Pem, channel_credentials, channel_options
from starling.client.errors import telling
from starling.client.reply import Reply
from starling.client.requests import Prompt, generate_request, parts, tokenize_request
from starling.v1 import inference_pb2 as pb

Event = pb.GenerateStreamResponse
Events = Generator[Event, None, None]
AsyncEvents = AsyncGenerator[Event, None]


class Connection:
    """A channel and the calls of InferenceService on it; safe to share, between threads where blocking."""

    library: Any  # grpc or grpc.aio: both make channels by the same names and arguments

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool | Pem | None = None,
        certificate: tuple[Pem, Pem] | None = None,
        retries: int = 4,
        max_message_bytes: int = 32 * 2**20,
    ) -> None:
        """
        Args:
            address: host:port.
            api_key: the server's --api-key.
            tls: the authorities to trust, as PEM; True: the system's. Default: plain text.
            certificate: the client's own chain and key, as PEM, for mTLS.
            retries: how often a call that the server has no room for is repeated before it has answered, 0 to 4.
            max_message_bytes: a request that takes more goes up in pieces. The server takes messages of up to
                GetCapabilities' max_request_bytes. What it sends has no bound.

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
        # One type for all three calls that generate: each message of GenerateUploadStream and Generate is, field for
        # field, one of GenerateStream (tests/unit/test_client.py).
        self._stream = self._method("unary_stream", "GenerateStream", pb.GenerateStreamRequest, Event)
        self._upload = self._method("stream_stream", "GenerateUploadStream", pb.GenerateUploadStreamRequest, Event)
        self._generate = self._method("unary_unary", "Generate", pb.GenerateStreamRequest, pb.GenerateResponse)
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

    def _uploads(self, request: pb.GenerateStreamRequest, asked: bool) -> bool:
        """Whether a request goes up in pieces (raises ValueError where it would have to, and has none)."""
        size = request.ByteSize()
        if not asked and size <= self.max_message_bytes:
            return False
        if request.HasField("chat"):
            reason = f"messages can't be uploaded in pieces, and these take {size} bytes"
            allowed = f"up to {self.max_message_bytes}, the client's max_message_bytes"
            raise ValueError(f"The prompt is refused: {reason}. Allowed: {allowed}.")
        return True

    def _begin(self, request: pb.GenerateStreamRequest, upload: bool, timeout: float | None) -> Any:
        if upload:
            return self._upload(parts(request), timeout=timeout, metadata=self.metadata)
        return self._stream(request, timeout=timeout, metadata=self.metadata)


class Client(Connection):
    """The blocking client. Its methods raise StarlingError for what the server refuses, TypeError and ValueError for
    what can't be asked.

    Every ``timeout`` is in seconds, for the whole call with its retries; by default there is none.
    """

    library = grpc

    def stream(self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any) -> Events:
        """The events of a generation. The call starts with the first one asked for, and ends with the iterator: at its
        end, its ``close()``, or when a loop is left that holds the only reference.

        Args:
            prompt: text, token ids, or messages with ``role`` and ``content``.
            upload: send the prompt in pieces, however short.
            fields: sampling parameters by vLLM's names; ``star``, Star Attention's options, as ``{"mode": "on",
                "block_size": 4096}`` or under their flat names; request_id, cache_salt, priority, lora_name, progress;
                for messages add_generation_prompt. None: not given.
        """
        request = generate_request(prompt, fields)
        return self._events(request, self._uploads(request, upload), timeout)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any
    ) -> pb.GenerateResponse:
        """The same in one reply; there is no ``progress``."""
        request = generate_request(prompt, fields, without=("progress",))
        if not self._uploads(request, upload):
            return self._ask(self._generate, request, timeout)
        reply = Reply()
        for event in self._events(request, True, timeout):
            reply.add(event)
        return reply.whole()

    def tokenize(
        self, prompt: Prompt, *, timeout: float | None = None, add_generation_prompt: bool | None = None
    ) -> pb.TokenizeResponse:
        """The token ids that a text or messages are to the model."""
        return self._ask(self._tokenize, tokenize_request(prompt, add_generation_prompt), timeout)

    def capabilities(self, *, timeout: float | None = None) -> pb.GetCapabilitiesResponse:
        """What the server offers, and its limits."""
        return self._ask(self._capabilities, pb.GetCapabilitiesRequest(), timeout)

    def close(self) -> None:
        """Close the connection; calls that run end."""
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: Any, request: Any, timeout: float | None) -> Any:
        with telling():
            return method(request, timeout=timeout, metadata=self.metadata)

    def _events(self, request: pb.GenerateStreamRequest, upload: bool, timeout: float | None) -> Events:
        call = self._begin(request, upload, timeout)
        try:
            with telling():
                yield from call
        finally:
            call.cancel()


class AsyncClient(Connection):
    """The client for asyncio, to be made where the loop runs: the methods of Client, to be awaited or iterated over."""

    library = grpc.aio

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any
    ) -> AsyncEvents:
        """As Client.stream; a loop that is left ends the call in the loop's next round, ``aclose()`` at once."""
        request = generate_request(prompt, fields)
        return self._events(request, self._uploads(request, upload), timeout)

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, upload: bool = False, **fields: Any
    ) -> pb.GenerateResponse:
        """As Client.generate."""
        request = generate_request(prompt, fields, without=("progress",))
        if not self._uploads(request, upload):
            return await self._ask(self._generate, request, timeout)
        reply = Reply()
        async for event in self._events(request, True, timeout):
            reply.add(event)
        return reply.whole()

    async def tokenize(
        self, prompt: Prompt, *, timeout: float | None = None, add_generation_prompt: bool | None = None
    ) -> pb.TokenizeResponse:
        """As Client.tokenize."""
        return await self._ask(self._tokenize, tokenize_request(prompt, add_generation_prompt), timeout)

    async def capabilities(self, *, timeout: float | None = None) -> pb.GetCapabilitiesResponse:
        """As Client.capabilities."""
        return await self._ask(self._capabilities, pb.GetCapabilitiesRequest(), timeout)

    async def close(self) -> None:
        """As Client.close."""
        await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, method: Any, request: Any, timeout: float | None) -> Any:
        with telling():
            return await method(request, timeout=timeout, metadata=self.metadata)

    async def _events(self, request: pb.GenerateStreamRequest, upload: bool, timeout: float | None) -> AsyncEvents:
        call = self._begin(request, upload, timeout)
        try:
            with telling():
                async for event in call:
                    yield event
        finally:
            call.cancel()
