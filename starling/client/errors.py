"""The exception of a failed call, made from the gRPC status and its details."""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2


class StarlingError(Exception):
    """The server refused a call, or the call was interrupted.

    Attributes:
        code: the gRPC status code; docs/grpc.md lists the causes of each.
        message: the server's message.
        field: the request's field that the error is about, as ``sampling.top_p``; None where the server names none.
        retry_after: seconds after which to try again; None where the server does not say.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, field: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(code, message, field, retry_after)  # all of them: pickle passes these to __init__
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class ConnectError(StarlingError):
    """There is no connection to a server; the code is UNAVAILABLE."""

    def __init__(self, address: str, reason: str = "") -> None:
        message = f"can't connect to {address} (is the server running with --grpc-port?)"
        super().__init__(grpc.StatusCode.UNAVAILABLE, f"{message}: {reason}" if reason else message)
        self.args = address, reason

    def __str__(self) -> str:
        return self.message


UNCONNECTED = re.compile(r"failed to connect to all addresses|DNS resolution failed")
LAST_ERROR = re.compile(r"last error: (?:UNKNOWN: )?(.*)")


def starling_error(error: Any) -> StarlingError:
    """Convert a grpc.RpcError, of a blocking or an asyncio call."""
    trailers = dict(error.trailing_metadata() or ())
    # grpcio-status would be one more requirement, and it reads the errors of blocking calls only.
    details = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    field = retry_after = None
    for detail in details:
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return StarlingError(error.code(), error.details() or "", field, retry_after)


def converted(error: Any, address: str, probed: Any) -> StarlingError:
    """Return the exception of a failed call.

    Args:
        error: a grpc.RpcError, of a blocking or an asyncio call.
        address: address of the server.
        probed: error of another call, where that says more about the connection; else ``error``.
    """
    details = probed.details() or ""
    if not UNCONNECTED.search(details):
        return starling_error(error)
    last = LAST_ERROR.search(details)
    return ConnectError(address, last[1] if last else details)
