"""ASGI middleware: each response of an activated server says in a header how its prompt is prefilled.

There is one `x-starling-plan` header for each prompt, a JSON object; streamed responses have it too.
"""

from __future__ import annotations

import json
from typing import Any

from engine_ext.requests import ResponsePlans, response_plans

HEADER = b"x-starling-plan"


class PlanHeader:
    """The middleware around ``app``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        noted = ResponsePlans()
        response_plans.set(noted)

        async def send_with_plans(message: Any) -> None:
            if message["type"] == "http.response.start" and noted.plans:
                headers = [(HEADER, json.dumps(plan).encode()) for plan in noted.plans]
                message = message | {"headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, send_with_plans)
