"""Options and credentials of a client's channel: retries, message sizes, pings, TLS."""

from __future__ import annotations

import json
from typing import Any

import grpc

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
