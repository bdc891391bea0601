"""Options and credentials of a client's channel, and calls that the server ends before it has read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

from starling.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_RETRIES = 4  # gRPC makes at most 5 attempts, whatever the policy says
MAX_INT = 2**31 - 1
PING_MS = 30_000  # the server allows one every 10 s

Pem = bytes


def channel_options(retries: int) -> list[tuple[str, Any]]:
    """Return the options of a channel.

    gRPC itself makes the retries. It waits as long as the server's pushback says; without pushback, it waits a
    doubling, jittered time. It keeps to the call's deadline, and retries no call once the server has begun to answer.

    Raises:
        ValueError: ``retries`` is not one of 0 to 4.
    """
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(
            f"retries={retries} is refused: gRPC repeats a call at most {MAX_RETRIES} times. Allowed: 0 to 4."
        )
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", -1),  # the log probabilities of a long prompt exceed gRPC's 4 MiB
        # A stream has no messages during a long prefill. Pings find a lost connection.
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if not retries:
        return options
    policy = {
        "maxAttempts": retries + 1,
        "initialBackoff": "0.5s",
        "maxBackoff": "4s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{"service": SERVICE}], "retryPolicy": policy}]}
    # gRPC retries a call that fits its retry buffer, by default 256 KiB: some 60k token ids. This buffer fits any call.
    # Where an upload outgrows the buffer while the server refuses the upload, grpcio 1.85 even aborts the process
    # (`ILLEGAL STATE` of promise_based_filter.cc). The size can come down when the test of a refused upload passes
    # without it.
    return [
        *options,
        ("grpc.service_config", json.dumps(config)),
        ("grpc.per_rpc_retry_buffer_size", MAX_INT),
    ]


def channel_credentials(tls: bool | Pem | None, certificate: tuple[Pem, Pem] | None) -> grpc.ChannelCredentials | None:
    """Return the channel's TLS credentials, or None for plain text.

    Args:
        tls: certificates of the trusted authorities, as PEM, or True for the system's.
        certificate: the client's own chain and key, as PEM, for mTLS. With it the channel uses TLS in any case.
    """
    # Not `not tls`: an empty file of authorities must not mean plain text.
    if not certificate and (tls is None or tls is False):
        return None
    chain, key = certificate or (None, None)
    return grpc.ssl_channel_credentials(None if isinstance(tls, bool) else tls, key, chain)


WAIT_SECONDS = 5.0
"""Seconds that a server's status may take after a write has failed. Both come together on a live connection."""


class EarlyStatus:
    """Keeps the status with which the server ended a call.

    A piece that is sent while the server refuses the upload can't be written. grpc.aio then replaces the server's
    status with INTERNAL, "Internal error from Core" (grpc/grpc#36066), or reports that one before the server's status
    has arrived. It calls the callbacks of the call for each of the two. This class can go when grpc.aio keeps the
    server's status (grpc/grpc#43486); ``test_an_upload_is_refused_before_its_end`` shows that.

    Args:
        call: a call of grpc.aio that has just begun.
    """

    def __init__(self, call: Any) -> None:
        self._status: grpc.aio.AioRpcError | None = None
        self._known = asyncio.Event()
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        # Nothing here waits: the call has a status, which is replaced when this method has returned.
        code, details = _result(call.code()), _result(call.details())
        if not _is_failed_write(code, details):
            self._status = grpc.aio.AioRpcError(code, None, _result(call.trailing_metadata()), details)
            self._known.set()

    async def of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the server's status, where ``error`` is a failed write in place of it; else ``error``."""
        if not _is_failed_write(error.code(), error.details()):
            return error
        try:
            await asyncio.wait_for(self._known.wait(), WAIT_SECONDS)
        except TimeoutError:
            return error
        return self._status or error


def _is_failed_write(code: grpc.StatusCode, details: str | None) -> bool:
    return code is grpc.StatusCode.INTERNAL and details == "Internal error from Core"


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that does not wait.

    Raises:
        RuntimeError: it waits.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("the coroutine waits")
