"""ASGI middleware: notes who sent a request, for the rules of the prefix cache."""

from __future__ import annotations

from typing import Any

from starling.engine_ext.clients import Client, bearer_key, current_client


class NoteClient:
    """The middleware around ``app``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            found = (value for name, value in scope["headers"] if name.lower() == b"authorization")
            key = bearer_key(next(found, b"").decode("latin-1"))
            current_client.set(Client(key, scope["app"].state.args.enable_prompt_tokens_details))
        await self.app(scope, receive, send)
