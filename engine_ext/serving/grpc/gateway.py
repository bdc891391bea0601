"""The service vllm.grpc.engine.VllmEngine, which gateways such as SMG call, on the OpenAI server's engine.

The package smg-grpc-servicer implements it (the extra `smg`). Here it gets the bounds and checks of starling.v1, and
the metadata of an answer has the prompt's plan. A request has no star options: the server's defaults apply to it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_servicer.vllm.servicer import VllmEngineServicer
from smg_grpc_servicer.vllm.warmup import WARMUP_ENV
from vllm.exceptions import VLLMValidationError

from starling.engine_ext.front.bounds import KV_TRANSFER, REQUEST_ID, SAMPLING, shortened
from starling.engine_ext.front.call import this_call
from starling.engine_ext.serving.grpc.inference import Inference
from starling.engine_ext.serving.grpc.messages import DuplicateRequestError, given
from starling.engine_ext.serving.http.middleware import HEADER, header_value
from starling.v1 import inference_pb2

GATEWAY_SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name

MEDIA = {"mm_inputs", "extra_mm_inputs", "media_refs"}
"""Fields of a GenerateRequest with images or videos: tensors, names of shared memory, or addresses to fetch."""

PREFIX = "gateway-"
"""Prefix of the engine's ids of these requests, so that no client can name a request of another front."""


class Gateway(VllmEngineServicer):
    """Servicer of the package, behind Starling's checks.

    Args:
        inference: the service of starling.v1, whose limits, tokenizer and admission apply here too.
    """

    def __init__(self, inference: Inference) -> None:
        # The package would send prompts of many lengths through the engine, for minutes on a CPU.
        os.environ.setdefault(WARMUP_ENV, "off")
        super().__init__(inference.engine, time.time())
        # It logs a line for each request. vLLM does so only with --enable-log-requests.
        logging.getLogger("smg_grpc_servicer.vllm.servicer").setLevel(logging.WARNING)
        self.inference = inference
        self.clients: dict[str, str] = {}  # of the running requests, by the engine's id

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.GenerateResponse]:
        client, name = self.inference.client_of(context), PREFIX + request.request_id
        with ExitStack() as taken:
            try:
                taken.enter_context(self._unique_id(request.request_id, client))
                await self._check(request, client)
            except Exception as error:
                await self.inference.end_call(error, request.WhichOneof("input") or "tokenized", context)
            request.request_id = name
            async with aclosing(super().Generate(request, BoundedErrors(self.engine, context))) as responses:
                async for response in responses:
                    yield response
            context.set_trailing_metadata(((HEADER.decode(), header_value(this_call().plans).decode()),))

    @contextmanager
    def _unique_id(self, request_id: str, client: str) -> Iterator[None]:
        """Reserve a request's id until the request ends, from before its text is tokenised, when other calls run.

        Raises:
            VLLMValidationError: the id is empty or too long.
            DuplicateRequestError: a request of that id is running.
        """
        REQUEST_ID.check(len(request_id))
        if not request_id:
            raise VLLMValidationError("request_id is empty: gateways name their requests.", parameter="request_id")
        if PREFIX + request_id in self.clients:
            raise DuplicateRequestError(f"request_id {request_id!r} is running")
        self.clients[PREFIX + request_id] = client
        try:
            yield
        finally:
            del self.clients[PREFIX + request_id]

    async def _check(self, request: pb.GenerateRequest, client: str) -> None:
        """Check a request as one of starling.v1, and make token ids of its text.

        Raises:
            VLLMValidationError, ValueError: the input is bad.
            Exception: the engine can't take the request, see Inference.check_admission.
        """
        self.inference.check_admission(max(request.sampling_params.n, 1))
        SAMPLING.check(request.sampling_params.ByteSize())
        # The event loop parses it, and copies it with the parameters; the engine gets it once for each choice.
        KV_TRANSFER.check(len(request.kv_transfer_params_json))
        for field in sorted(MEDIA & given(request).keys()):
            reason = "this service takes text only. Send images over HTTP."
            raise VLLMValidationError(f"{field} is refused: {reason}", parameter=field)
        if request.sampling_params.HasField("truncate_prompt_tokens"):
            reason = "token ids are not truncated here, so it would have no effect"
            raise VLLMValidationError(f"truncate_prompt_tokens is refused: {reason}.", parameter="sampling_params")
        if request.WhichOneof("input") == "text":
            text = inference_pb2.TokenizeRequest(text=request.text)
            request.tokenized.input_ids.extend(await self.inference.tokenizing.token_ids(text, client))
        self.inference.limit.check_ids(len(request.tokenized.input_ids))
        self.inference.limit.check_characters(len(request.tokenized.original_text))

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        """Abort running requests of the same client; others are left alone, as are ids that don't run."""
        client = self.inference.client_of(context)
        names = [PREFIX + name for name in request.request_ids]
        own = [name for name in names if self.clients.get(name) == client]
        return await super().Abort(pb.AbortRequest(request_ids=own), BoundedErrors(self.engine, context))

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        try:
            self.inference.check_admission(1)
            REQUEST_ID.check(len(request.request_id))
            self.inference.limit.check_ids(len(request.tokenized.input_ids))
        except Exception as error:
            await self.inference.end_call(error, "tokenized", context)
        return await super().Embed(request, BoundedErrors(self.engine, context))


class BoundedErrors:
    """Context of a call, with starling.v1's errors: a bounded message, and UNAVAILABLE if the engine is dead."""

    def __init__(self, engine: Any, context: grpc.aio.ServicerContext) -> None:
        self.engine = engine
        self.context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        if self.engine.errored:
            code, details = grpc.StatusCode.UNAVAILABLE, str(self.engine.dead_error)
        await self.context.abort(code, shortened(details))
