"""ASGI middleware: each response of an activated server says in the header `x-starling-plan` how it is prefilled.

The header is a JSON object for one prompt. For several prompts it is an array of the first prompts' plans, as many as
fit into MAX_BYTES: Python's http.client refuses responses with more than 100 headers, and proxies limit their size.
Streamed responses have the header too. It goes out before their prompt is prefilled, so it does not say where documents
came from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starling.engine_ext.front.call import this_call

HEADER = b"x-starling-plan"
MAX_BYTES = 2048
SOURCES, MAX_SOURCES = "document_sources", 32
"""Field of a plan, and the largest number of documents that the header lists in it."""


def header_value(plans: Sequence[dict[str, Any]]) -> bytes:
    """Return the header's value for the plans of a response, at least one."""
    if len(plans) == 1:
        return json.dumps(with_few_sources(plans[0], MAX_SOURCES)).encode()
    shown, size = [], len("[]")
    for plan in (with_few_sources(plan, 0) for plan in plans):
        shown.append(json.dumps(plan))
        size += len(shown[-1]) + len(", ")
        if size > MAX_BYTES:
            shown.pop()
            break
    return f"[{', '.join(shown)}]".encode()


def with_few_sources(plan: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a plan that lists the sources of at most ``most`` documents, each with only the kinds that have tokens."""
    if SOURCES not in plan:
        return plan
    listed = [{kind: tokens for kind, tokens in counts.items() if tokens} for counts in plan[SOURCES][:most]]
    others = {key: value for key, value in plan.items() if key != SOURCES}
    return others | ({SOURCES: listed} if listed else {})


class PlanHeader:
    """Middleware around ``app`` that adds the header."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = this_call()

        async def send_with_plans(message: Any) -> None:
            if message["type"] == "http.response.start" and call.plans:
                headers = [*message.get("headers", []), (HEADER, header_value(call.plans))]
                message = message | {"headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_plans)
