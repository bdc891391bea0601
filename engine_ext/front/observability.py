"""Metrics of the API server on vLLM's /metrics, and spans of requests for traces (vLLM's --otlp-traces-endpoint).

A request has the span "starling", from its arrival at the engine to its end, which says how its prompt was prefilled.
Its parent is the client's, if the client has sent one (`traceparent`), and vLLM's own span "llm_request" is its child.
So is "starling plan", the time in which the plan was decided. Features have spans of their own there.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from prometheus_client import Counter, Gauge
from vllm import tracing


class FrontMetrics:
    """Metrics that are counted in the API server."""

    def __init__(self) -> None:
        self.requests = Counter("starling:requests", "Requests admitted, by prefill attention.", ["attention"])
        for attention in ("dense", "star"):
            self.requests.labels(attention)
        self.rejections = Counter("starling:plan_rejections", "Requests whose star options were refused.", ["option"])
        self.loop_stalls = Counter(
            "starling:event_loop_stalls", "Times that an API server's event loop stood still for over 0.2 s."
        )
        self.longest_loop_stall = Gauge(
            "starling:event_loop_longest_stall_seconds", "The longest of these times.", multiprocess_mode="max"
        )


front_metrics = functools.cache(FrontMetrics)


def traces(engine: Any) -> bool:
    """Return whether an engine's server traces requests."""
    endpoint = engine.vllm_config.observability_config.otlp_traces_endpoint
    return endpoint is not None and tracing.is_tracing_available()


def headers_of_call(engine: Any, metadata: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Return the trace headers in a gRPC call's metadata, as vLLM takes HTTP's, or None without headers or tracing."""
    if not tracing.contains_trace_headers(metadata):
        return None
    if not traces(engine):
        tracing.log_tracing_disabled_warning()
        return None
    return tracing.extract_trace_headers(metadata)


class PromptSpan:
    """Span of a request, which begins when the object is made.

    Args:
        headers: trace headers of the parent span, or None if it has no parent.
        planning: begin and end of the planning, as in ``Decision``, or None if its front did not plan it.
    """

    def __init__(self, headers: Mapping[str, str] | None, planning: tuple[int, int] | None) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = tracing.extract_trace_context(headers)
        began = None if planning is None else planning[0]
        self.span = trace.get_tracer("starling").start_span("starling", context=parent, start_time=began)
        context, self.headers = trace.set_span_in_context(self.span), dict[str, str]()
        TraceContextTextMapPropagator().inject(self.headers, context)
        if planning is not None:
            tracing.instrument_manual("starling plan", *planning, context=context)

    async def around(self, outputs: AsyncGenerator[Any, None], plan: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield the engine's outputs, and end the span with them.

        Args:
            plan: the plan as a response shows it; its front may still add to it.
        """
        has_output = False
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if not has_output:
                        self.span.add_event("first token")
                    has_output = True
                    yield output
        except Exception as error:
            self.span.record_exception(error)
            raise
        finally:
            self.span.set_attributes(attributes_of(plan))
            self.span.end()


def attributes_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shown plan as attributes of a span, with the number of documents and their tokens by source."""
    found = {f"starling.{name}": value for name, value in plan.items() if isinstance(value, (str, int, float))}
    sources = plan.get("document_sources") or ()
    if sources:
        found["starling.num_documents"] = len(sources)
    for source in sources:
        for name, tokens in source.items():
            key = f"starling.document_tokens.{name}"
            found[key] = found.get(key, 0) + tokens
    return found
