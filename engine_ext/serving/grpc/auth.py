"""Interceptors of the gRPC server for API keys, drain and the sender of a call; its TLS credentials and ports."""

from __future__ import annotations

import asyncio
import ssl
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc

from starling.engine_ext.front.cache_salt import bearer_key, digest, has_valid_key
from starling.engine_ext.front.call import Call, current_call

HEALTH_PREFIX = "/grpc.health.v1.Health/"
ADMIN_PREFIX = "/starling.v1.AdminService/"
GATEWAY_PREFIX = "/vllm.grpc.engine.VllmEngine/"
ADMIN_METHODS = (ADMIN_PREFIX, *(f"{GATEWAY_PREFIX}{name}" for name in ("FlushCache", "StartProfile", "StopProfile")))
"""Prefixes of the methods that need the admin key, and no API key."""

KV_EVENTS = f"{GATEWAY_PREFIX}SubscribeKvEvents"
"""Method whose answers have the tokens of all clients' prompts, and which runs as long as its client."""

SEVERAL_KEYS = "the metadata has several `authorization`: send one"

METHOD_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""Functions of gRPC that make a handler, by (request_streaming, response_streaming)."""

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]]
Metadata = Iterable[tuple[str, str | bytes]] | None


def authorization(metadata: Metadata) -> str:
    """Return the value of a call's `authorization` metadata, or "" if it has none."""
    return str(next((value for key, value in metadata or () if key == "authorization"), ""))


def has_several_keys(metadata: Metadata) -> bool:
    """Return whether a call has more than one `authorization` metadata value; only the first would be checked."""
    return sum(key == "authorization" for key, _ in metadata or ()) > 1


def host_of(context: grpc.aio.ServicerContext) -> str:
    """Return the address of a call's client, without the port."""
    return context.peer().rpartition(":")[0]


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Interceptor that refuses calls without a valid API key, and all calls while the server drains.

    Health and the methods of the admin key need no API key, and are served while the server drains.

    Args:
        api_keys: the valid keys; empty if calls need no key.
    """

    def __init__(self, api_keys: Sequence[str]) -> None:
        self.digests = [digest(key) for key in api_keys]
        # KV events have the tokens of all clients: where these have keys, only the admin key allows them.
        self.admin_methods = (*ADMIN_METHODS, *([KV_EVENTS] if api_keys else []))
        self.draining = False
        self.calls: set[asyncio.Task] = set()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith((HEALTH_PREFIX, *self.admin_methods)):
            return handler
        text = self.refusal(handler_call_details.invocation_metadata)
        if text is not None:
            return refusal_handler(handler, grpc.StatusCode.UNAUTHENTICATED, text)
        if self.draining:
            return refusal_handler(handler, grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        task = asyncio.current_task()
        if task is not None and method != KV_EVENTS:
            self.calls.add(task)
            task.add_done_callback(self.calls.discard)
        return handler

    def refusal(self, metadata: Metadata) -> str | None:
        """Return why a call's metadata does not allow the call, or None if it does."""
        if has_several_keys(metadata):
            return SEVERAL_KEYS
        if not self.digests or has_valid_key(authorization(metadata), self.digests):
            return None
        return "this server needs the metadata `authorization: Bearer <API key>`"

    def client_of(self, context: grpc.aio.ServicerContext) -> str:
        """Return a name for the client of an allowed call: its address, and the digest of its API key if it has one.

        The key alone would not do: clients of a server with one key would take one another's share.
        """
        given, host = authorization(context.invocation_metadata()), host_of(context)
        return f"{host} {digest(bearer_key(given)).hex()}" if has_valid_key(given, self.digests) else host

    async def drain(self, seconds: float) -> bool:
        """Refuse new calls, wait for running calls, and return whether all of them ended within ``seconds``."""
        self.draining = True
        if not self.calls:
            return True
        _, pending = await asyncio.wait(self.calls, timeout=seconds)
        return not pending


class NoteClient(grpc.aio.ServerInterceptor):
    """Interceptor that notes who sent a call, for the rules of the prefix cache.

    It sets ``current_call`` for the call's coroutine, in which gRPC also runs interceptors.

    Args:
        show_cached: whether responses say how many tokens were cached.
    """

    def __init__(self, show_cached: bool) -> None:
        self.show_cached = show_cached

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        key = bearer_key(authorization(handler_call_details.invocation_metadata))
        current_call.set(Call(key, self.show_cached))
        return await continuation(handler_call_details)


def refusal_handler(handler: grpc.RpcMethodHandler, code: grpc.StatusCode, text: str) -> grpc.RpcMethodHandler:
    """Return a handler that ends each call with ``code`` and reads no message; gRPC's own unary calls read it first."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, text)

    make_handler = METHOD_HANDLERS[True, handler.response_streaming]
    return make_handler(refuse, handler.request_deserializer, handler.response_serializer)


def server_credentials(args: Namespace) -> grpc.ServerCredentials | None:
    """Return credentials from the HTTP server's --ssl-* options, or None if they give no certificate.

    Raises:
        ValueError: gRPC does not support the options, or they need --ssl-ca-certs.
        OSError: a file of the options can't be read.
    """
    if not (args.ssl_certfile and args.ssl_keyfile):
        return None
    if args.ssl_cert_reqs == ssl.CERT_OPTIONAL:
        raise ValueError("--ssl-cert-reqs 1 (optional client certificate) is not supported over gRPC: use 0 or 2")
    require = args.ssl_cert_reqs == ssl.CERT_REQUIRED
    if require and not args.ssl_ca_certs:
        raise ValueError("--ssl-cert-reqs 2 needs --ssl-ca-certs, to check clients' certificates against")

    def certificates() -> grpc.ServerCertificateConfiguration:
        pair = (Path(args.ssl_keyfile).read_bytes(), Path(args.ssl_certfile).read_bytes())
        authorities = Path(args.ssl_ca_certs).read_bytes() if args.ssl_ca_certs else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)

    renew = certificates if args.enable_ssl_refresh else lambda: None
    return grpc.dynamic_ssl_server_credentials(certificates(), renew, require)


def add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Let a server listen on an address, with TLS if there are credentials, and return the port.

    Raises:
        RuntimeError: the server can't listen there.
    """
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials)
