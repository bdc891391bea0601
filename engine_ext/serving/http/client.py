"""ASGI middleware: makes the Call of each request, in which the others note what they learn of it.

When the application starts, it notes the application's list of models, which alone knows LoRA adapters by name, and
begins to watch the event loop and the size of requests' heads.
"""

from __future__ import annotations

from typing import Any

from starling.engine_ext.bounds import HEAD
from starling.engine_ext.call import Call, current_call
from starling.engine_ext.clients import authorization_of, bearer_key
from starling.engine_ext.front.loop_watch import watch_loop
from starling.engine_ext.front.state import front_state
from starling.vllm_compat.server import bound_request_heads


class NoteClient:
    """The middleware around ``app``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            key = bearer_key(authorization_of(scope))
            current_call.set(Call(key, scope["app"].state.args.enable_prompt_tokens_details))
        elif scope["type"] == "lifespan":
            state = scope["app"].state
            if state.engine_client is not None:  # else a server that only renders prompts
                front_state(state.engine_client).set_serving_models(state.openai_serving_models)
            bound_request_heads(HEAD.limit)
            watch = watch_loop()
            try:
                await self.app(scope, receive, send)
            finally:
                watch.stop()
            return
        await self.app(scope, receive, send)
