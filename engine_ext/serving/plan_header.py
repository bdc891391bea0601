"""ASGI middleware: each response of an activated server says how its prompt was prefilled.

One `x-starling-plan` header a prompt, a JSON object, on streamed and plain responses alike.
"""

from __future__ import annotations

import json
from typing import Any

from engine_ext.requests import response_plans

HEADER = b"x-starling-plan"


class PlanHeader:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        plans: dict[int, dict[str, Any]] = {}
        response_plans.set(plans)

        async def send_with_plans(message: Any) -> None:
            if message["type"] == "http.response.start" and plans:
                headers = [(HEADER, json.dumps(plan).encode()) for plan in plans.values()]
                message = message | {"headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, send_with_plans)
