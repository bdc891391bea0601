"""ASGI middleware: makes the Call of each request, in which the other middleware notes what it learns of the request.

When the application starts, it notes the application's list of models, which alone knows LoRA adapters by name, and
begins to watch the size of requests' heads, and, once it has started, the event loop. An application whose process does
not have Starling's hooks does not start: vLLM makes the process of each of several API servers.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from starling.engine_ext.front.bounds import HEAD
from starling.engine_ext.front.call import Call, current_call
from starling.engine_ext.front.client_keys import authorization_of, bearer_key
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.front.loop_watch import watch_loop
from starling.vllm_compat.front import is_hooked
from starling.vllm_compat.server_socket import bound_request_heads

NOT_HOOKED = "Starling is not in this vLLM: this process runs vLLM's own front"


class NoteClient:
    """Middleware around ``app`` that makes the Call of each request."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            key = bearer_key(authorization_of(scope))
            current_call.set(Call(key, scope["app"].state.args.enable_prompt_tokens_details))
        elif scope["type"] == "lifespan":
            state = scope["app"].state
            if state.engine_client is not None and not is_hooked():
                await receive()
                await send({"type": "lifespan.startup.failed", "message": NOT_HOOKED})
                return
            if state.engine_client is not None:  # else a server that only renders prompts
                front_state(state.engine_client).set_serving_models(state.openai_serving_models)
            bound_request_heads(HEAD.limit)
            await self._watched(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _watched(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application's lifespan, and watch its event loop once the application has started."""
        with ExitStack() as stack:

            async def send_and_watch(message: Any) -> None:
                await send(message)
                if message["type"] == "lifespan.startup.complete":
                    stack.callback(watch_loop().stop)

            await self.app(scope, receive, send_and_watch)
