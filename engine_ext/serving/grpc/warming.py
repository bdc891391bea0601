"""WarmDocuments: a small request for each document, so that it is in the library before somebody asks about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt

from starling.engine_ext.bounds import DOCUMENTS, DOCUMENTS_AT_ONCE, shortened
from starling.engine_ext.serving.grpc.prompts import PromptLimit
from starling.evaluation.warm_prompts import QUESTION, in_parallel, warm_prompt
from starling.v1 import inference_pb2 as pb

Events = AsyncGenerator[pb.GenerateStreamResponse]


@dataclass(frozen=True)
class Warming:
    """Computes documents as requests of their own.

    Attributes:
        renderer: the engine's.
        limit: the longest prompt.
        generate: has the engine run a request; yields its events.
    """

    renderer: Any
    limit: PromptLimit
    generate: Callable[[pb.GenerateRequest], Events]

    async def run(
        self, request: pb.WarmDocumentsRequest, send: Callable[[pb.WarmDocumentsResponse], Awaitable[None]]
    ) -> None:
        """Compute the documents, and send what became of each when it is done.

        Raises:
            VLLMValidationError: too many documents, or none.
            Exception: the engine's, where it can't take a request; then the other documents end too.
        """
        DOCUMENTS.check(len(request.documents))
        DOCUMENTS_AT_ONCE.check(request.concurrency)
        if not request.documents:
            raise VLLMValidationError("There are no documents.", parameter="documents")
        self.limit.check_characters(len(request.head))
        head = await self._tokens(request.head, is_first=True) if request.head else []
        question = await self._tokens(QUESTION)
        waiting, sending = iter(enumerate(request.documents)), asyncio.Lock()

        async def work() -> None:
            for index, text in waiting:
                done = await self._warmed(index, text, head, question, request)
                async with sending:
                    await send(done)

        await in_parallel(work, max(request.concurrency, 1))
        # vLLM begins to store what a step has computed in the next step.
        await self._plan_of(message_of(question, [], request, max_tokens=2))

    async def _warmed(
        self, index: int, text: str, head: list[int], question: list[int], request: pb.WarmDocumentsRequest
    ) -> pb.WarmDocumentsResponse:
        """Compute one document; where it is refused, the response says why."""
        try:
            self.limit.check_characters(len(text))
            document = await self._tokens(text)
            if not document:
                raise VLLMValidationError("The document has no tokens.", parameter="documents")
            tokens, starts = warm_prompt(head, document, question)
            plan = await self._plan_of(message_of(tokens, starts, request, max_tokens=1))
        except (VLLMValidationError, ValueError) as refused:
            return pb.WarmDocumentsResponse(index=index, error=shortened(str(refused)))
        source = plan.document_sources[0] if plan.document_sources else None
        return pb.WarmDocumentsResponse(index=index, tokens=len(document), source=source)

    async def _tokens(self, text: str, is_first: bool = False) -> list[int]:
        """The tokens of a text; special tokens come before the first one of a prompt."""
        if not text:
            return []
        params = self.renderer.default_cmpl_tok_params
        params = params if is_first else replace(params, add_special_tokens=False)
        (made,) = await self.renderer.render_cmpl_async([TextPrompt(prompt=text)], params, prompt_extras=None)
        return list(made["prompt_token_ids"])

    async def _plan_of(self, message: pb.GenerateRequest) -> pb.Plan:
        """Run a request to its end; returns how it was prefilled."""
        plan = pb.Plan()
        async with aclosing(self.generate(message)) as events:
            async for event in events:
                if event.HasField("final"):
                    plan = event.final.plan
        return plan


def message_of(
    tokens: list[int], starts: list[int], request: pb.WarmDocumentsRequest, max_tokens: int
) -> pb.GenerateRequest:
    """A request of these tokens, with documents at ``starts``; dense where there are none."""
    star = pb.StarOptions(mode=pb.StarOptions.MODE_ON, segment_offsets=starts)
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=tokens),
        star=star if starts else pb.StarOptions(mode=pb.StarOptions.MODE_OFF),
        sampling=pb.SamplingParams(max_tokens=max_tokens, temperature=0),
    )
    if request.HasField("cache_salt"):
        message.cache_salt = request.cache_salt
    return message
