"""gRPC interceptor: notes who sent a call, for the rules of the prefix cache."""

from __future__ import annotations

import grpc

from starling.engine_ext.call import Call, current_call
from starling.engine_ext.clients import bearer_key
from starling.engine_ext.serving.grpc.auth import Continuation


class NoteClient(grpc.aio.ServerInterceptor):
    """Sets ``current_call`` for the call's coroutine, in which gRPC runs interceptors too.

    Args:
        show_cached: whether responses say how many tokens were cached.
    """

    def __init__(self, show_cached: bool) -> None:
        self.show_cached = show_cached

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        metadata = handler_call_details.invocation_metadata or ()
        found = (value for key, value in metadata if key == "authorization")
        current_call.set(Call(bearer_key(str(next(found, ""))), self.show_cached))
        return await continuation(handler_call_details)
