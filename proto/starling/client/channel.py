"""What both clients tell gRPC of their channel: repeated calls, sizes, pings, TLS."""

from __future__ import annotations

import json
from typing import Any

import grpc

from starling.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_RETRIES = 4  # gRPC takes a policy of more than 5 attempts for one of 5
MAX_INT = 2**31 - 1
PING_MS = 30_000  # the server takes one every 10 s

Pem = bytes


def channel_options(retries: int) -> list[tuple[str, Any]]:
    """Options of a channel.

    Retries are gRPC's own: it waits as long as the server's pushback says, else a doubling and jittered time, keeps to
    the call's deadline, and repeats nothing once the server has begun to answer.

    Raises:
        ValueError: ``retries`` is not one of 0 to 4.
    """
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(
            f"retries={retries} is refused: gRPC repeats a call at most {MAX_RETRIES} times. Allowed: 0 to 4."
        )
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", -1),  # the log probabilities of a long prompt pass gRPC's 4 MiB
        # A long prefill is a silent stream: see that a connection is lost, without closing a live one.
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
    # gRPC repeats what it holds until the answer begins, by default 256 KiB: some 60k token ids. Here any call: where
    # an upload outgrows the bound while the server refuses it, grpcio 1.85 even aborts the process (`ILLEGAL STATE` of
    # promise_based_filter.cc). The bound may come down when the test of a refused upload passes without it.
    return [
        *options,
        ("grpc.service_config", json.dumps(config)),
        ("grpc.per_rpc_retry_buffer_size", MAX_INT),
    ]


def channel_credentials(tls: bool | Pem | None, certificate: tuple[Pem, Pem] | None) -> grpc.ChannelCredentials | None:
    """TLS as asked for; None: plain text.

    Args:
        tls: the authorities to trust, as PEM; True: the system's.
        certificate: the client's own chain and key, as PEM, for mTLS; there is no mTLS without TLS.
    """
    # Not by truth: an empty file of authorities must not mean plain text.
    if not certificate and (tls is None or tls is False):
        return None
    chain, key = certificate or (None, None)
    return grpc.ssl_channel_credentials(None if isinstance(tls, bool) else tls, key, chain)
