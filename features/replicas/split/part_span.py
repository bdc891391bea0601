"""The span of a replica's part of a prompt, on servers that trace requests (vLLM's --otlp-traces-endpoint)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm import tracing

from starling.features.front_request import TRACE_HEADERS


@contextmanager
def part_span(keywords: Mapping[str, Any], **attributes: Any) -> Iterator[dict[str, Any]]:
    """Trace a replica's part of a prompt in a span, if the prompt has a trace.

    Args:
        keywords: of AsyncLLM.generate.
        attributes: of the span, without "starling."; more of them may be put into the dict.
    """
    headers, began = keywords.get(TRACE_HEADERS), time.time_ns()
    try:
        yield attributes
    finally:
        if headers is not None and tracing.is_tracing_available():
            tracing.instrument_manual(
                "starling part",
                began,
                time.time_ns(),
                attributes={f"starling.{name}": value for name, value in attributes.items()},
                context=tracing.extract_trace_context(headers),
            )
