"""WarmDocuments: a small request for each document, so that it is in the library before somebody asks about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

from vllm.exceptions import VLLMValidationError

from starling.config.warm_prompts import (
    CHAT,
    NO_HEAD,
    OTHER_DOCUMENT,
    OTHER_QUESTION,
    QUESTION,
    TEXTS,
    documents_of,
    in_parallel,
    joined_text,
    tokens_found,
)
from starling.engine_ext.front.bounds import DOCUMENTS, DOCUMENTS_AT_ONCE, shortened
from starling.engine_ext.front.call import current_call, this_call
from starling.engine_ext.serving.grpc.prompt_inputs import PromptLimit
from starling.v1 import inference_pb2 as pb

Events = AsyncGenerator[pb.GenerateStreamResponse]
TEXTS_HEAD = "the first text of a prompt of texts is its head, and no document: give the head that your prompts have"


@dataclass(frozen=True)
class Warming:
    """Computation of documents as requests of their own, with a check that another prompt finds each.

    Attributes:
        limit: the longest prompt.
        default_form: how the server's requests have their documents, as ``star_segments`` says it.
        generate: lets the engine run a request, and yields its events.
    """

    limit: PromptLimit
    default_form: str
    generate: Callable[[pb.GenerateRequest], Events]

    async def run(
        self, request: pb.WarmDocumentsRequest, send: Callable[[pb.WarmDocumentsResponse], Awaitable[None]]
    ) -> None:
        """Compute the documents, and send the result of each when it is done.

        Raises:
            VLLMValidationError: there are too many documents, or none; or no head although prompts have one.
            Exception: an error of the engine if it can't take a request; then the other documents end too.
        """
        DOCUMENTS.check(len(request.documents))
        DOCUMENTS_AT_ONCE.check(request.concurrency)
        if not request.documents:
            raise VLLMValidationError("There are no documents.", parameter="documents")
        self.limit.check_characters(len(request.head))
        form = request.segments or (TEXTS if self.default_form == "off" else self.default_form)
        if form in (CHAT, TEXTS) and not request.head:
            raise VLLMValidationError(f"head is empty: {NO_HEAD if form == CHAT else TEXTS_HEAD}.", parameter="head")
        waiting, sending = iter(enumerate(request.documents)), asyncio.Lock()

        async def work() -> None:
            for index, text in waiting:
                done = await self._warmed(index, text, form, request)
                async with sending:
                    await send(done)

        await in_parallel(work, max(request.concurrency, 1))
        # vLLM begins to store what a step has computed in the next step.
        last = pb.GenerateRequest(text=QUESTION, star=pb.StarOptions(mode=pb.StarOptions.MODE_OFF))
        await self._plan_of(completed(last, request, max_tokens=2))

    async def _warmed(
        self, index: int, text: str, form: str, request: pb.WarmDocumentsRequest
    ) -> pb.WarmDocumentsResponse:
        """Compute one document; the response says why if it is refused or another prompt does not find it."""
        copies = documents_of(text, bool(request.head))
        try:
            self.limit.check_characters(len(text))
            if not text:
                raise VLLMValidationError("The document has no text.", parameter="documents")
            plan = await self._plan_of(message_of(form, copies, QUESTION, request))
            answer = await self._looked_up(message_of(form, [text, OTHER_DOCUMENT], OTHER_QUESTION, request))
            tokens = tokens_found(answer)
        except (VLLMValidationError, ValueError) as refused:
            return pb.WarmDocumentsResponse(index=index, error=shortened(str(refused)))
        sources = plan.document_sources[: len(plan.document_sources) // len(copies)]
        source = added(sources) if sources else None
        return pb.WarmDocumentsResponse(index=index, tokens=tokens, source=source)

    async def _plan_of(self, message: pb.GenerateRequest) -> pb.Plan:
        """Run a request to its end and return the plan by which it was prefilled."""
        plan = pb.Plan()
        async with aclosing(self.generate(message)) as events:
            async for event in events:
                if event.HasField("final"):
                    plan = event.final.plan
        return plan

    async def _looked_up(self, message: pb.GenerateRequest) -> dict[str, Any]:
        """Look up what is cached of a request's prompt without running it, in a call of its own inside the client's."""
        call = replace(this_call(), only_looks_up=True, plans=[], request_ids=[], num_sequences=0)
        context = copy_context()
        context.run(current_call.set, call)
        await asyncio.create_task(self._plan_of(message), context=context)
        return call.cached or {"replicas": [], "plan": {}}


def message_of(
    form: str, documents: Sequence[str], question: str, request: pb.WarmDocumentsRequest
) -> pb.GenerateRequest:
    """Return the request of a prompt of these documents, in the form that the server's users send."""
    star = pb.StarOptions(mode=pb.StarOptions.MODE_ON)
    message = pb.GenerateRequest(star=star)
    if form == TEXTS:
        message.texts.texts.extend([request.head, *documents, question])
    elif form == CHAT:
        message.star.segments = CHAT
        for role, content in (("system", request.head), *(("user", text) for text in (*documents, question))):
            message.chat.messages.add(role=role, content=content)
    else:
        message.star.segments = form
        message.text = joined_text(form, request.head, documents, question)
    return completed(message, request, max_tokens=1)


def completed(message: pb.GenerateRequest, request: pb.WarmDocumentsRequest, max_tokens: int) -> pb.GenerateRequest:
    """Return the request with a short greedy output, and the salt of the call."""
    message.sampling.CopyFrom(pb.SamplingParams(max_tokens=max_tokens, temperature=0))
    if request.HasField("cache_salt"):
        message.cache_salt = request.cache_salt
    return message


def added(sources: Sequence[pb.DocumentSource]) -> pb.DocumentSource:
    """Return the sources of a document's blocks, added up."""
    names = [field.name for field in pb.DocumentSource.DESCRIPTOR.fields]
    return pb.DocumentSource(**{name: sum(getattr(source, name) for source in sources) for name in names})
