"""What stands before every gRPC call: key, shutdown, and whether its bytes are a message. And the server's TLS."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import ssl
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from engine_ext.serving.errors import grpc_code

# Open while the server drains, and with rules of access of their own or none.
APART = ("/grpc.health.v1.Health/", "/starling.v1.AdminService/")
WRAP = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def bears(metadata: Any, digests: Sequence[bytes]) -> bool:
    """Whether `authorization: Bearer KEY` of a call has one of the keys, given by their digests.

    Compared in constant time: digests have one length, and so tell nothing of the keys'.
    """
    value = next((value for key, value in metadata or () if key == "authorization"), "")
    scheme, _, token = str(value).partition(" ")
    token_digest = digest(token)
    matches = [secrets.compare_digest(token_digest, key) for key in digests]
    return scheme.lower() == "bearer" and any(matches)


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls through that bear a key, until the server drains; health checks and AdminService's always."""

    def __init__(self, api_keys: list[str]) -> None:
        self.keys = [digest(key) for key in api_keys]
        self.draining = False
        self.calls: set[asyncio.Task] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(APART):
            return handler
        if not self.admits(handler_call_details.invocation_metadata):
            text = "this server needs the metadata `authorization: Bearer <API key>`"
            return refusing(handler, grpc.StatusCode.UNAUTHENTICATED, text)
        if self.draining:
            return refusing(handler, grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        task = asyncio.current_task()
        if task is not None:
            self.calls.add(task)
            task.add_done_callback(self.calls.discard)
        return handler

    def admits(self, metadata: Any) -> bool:
        """Whether a call bears one of the keys, compared in constant time; any call where there are none."""
        return not self.keys or bears(metadata, self.keys)

    async def drain(self, seconds: float) -> bool:
        """Refuse new calls and wait for the running ones; whether they all ended within ``seconds``."""
        self.draining = True
        if not self.calls:
            return True
        _, pending = await asyncio.wait(self.calls, timeout=seconds)
        return not pending


class Reader(grpc.aio.ServerInterceptor):
    """Answers bytes that are no message of the called method with INVALID_ARGUMENT; grpc itself says UNKNOWN."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        ours = handler_call_details.method.startswith("/starling.")
        # Of a client's stream, the servicer that reads it meets the DecodeError itself.
        return handler if handler is None or not ours or handler.request_streaming else tolerant(handler)


def tolerant(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler of one request, a coroutine as ours all are, for which a DecodeError becomes a status."""
    serve = handler.unary_stream if handler.response_streaming else handler.unary_unary

    def read(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            return error

    async def behave(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, DecodeError):
            await context.abort(grpc_code(request), str(request))
        return await serve(request, context)

    return WRAP[False, handler.response_streaming](behave, read, handler.response_serializer)


def refusing(handler: grpc.RpcMethodHandler, code: grpc.StatusCode, text: str) -> grpc.RpcMethodHandler:
    """A handler of the same kind that ends each call with ``code``."""

    async def refuse(_request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, text)

    return WRAP[handler.request_streaming, handler.response_streaming](
        refuse, handler.request_deserializer, handler.response_serializer
    )


def server_credentials(args: Namespace) -> grpc.ServerCredentials | None:
    """Credentials from the HTTP server's --ssl-* options; None where they ask for no TLS.

    Raises:
        ValueError: they ask for what gRPC has not.
    """
    if not (args.ssl_certfile and args.ssl_keyfile):
        return None
    if args.ssl_cert_reqs == ssl.CERT_OPTIONAL:
        raise ValueError("--ssl-cert-reqs 1 (optional client certificate) can't be had over gRPC: use 0 or 2")
    require = args.ssl_cert_reqs == ssl.CERT_REQUIRED
    if require and not args.ssl_ca_certs:
        raise ValueError("--ssl-cert-reqs 2 needs --ssl-ca-certs, to check clients' certificates against")

    def certificates() -> grpc.ServerCertificateConfiguration:
        pair = (Path(args.ssl_keyfile).read_bytes(), Path(args.ssl_certfile).read_bytes())
        authority = Path(args.ssl_ca_certs).read_bytes() if args.ssl_ca_certs else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    if args.enable_ssl_refresh:
        return grpc.dynamic_ssl_server_credentials(certificates(), certificates, require)
    return grpc.dynamic_ssl_server_credentials(certificates(), lambda: None, require)
