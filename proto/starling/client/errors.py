"""How a call that failed is told: the status of gRPC, and what its details add to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2


class StarlingError(Exception):
    """A call that the server refused, or that broke off.

    Attributes:
        code: of gRPC; docs/grpc.md lists when each comes.
        message: the server's words.
        field: the request's field that the server blames, as ``sampling.top_p``; None where it names none.
        retry_after: seconds after which to try again; None where the server says nothing of that.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, field: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(code, message, field, retry_after)  # all of them: what pickle makes a copy from
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


def starling_error(error: Any) -> StarlingError:
    """A grpc.RpcError of a call of either kind, read out."""
    trailers = dict(error.trailing_metadata() or ())
    # By hand: grpcio-status would be one more requirement, and reads blocking calls only.
    details = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    field = retry_after = None
    for detail in details:
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return StarlingError(error.code(), error.details() or "", field, retry_after)


@contextmanager
def telling() -> Iterator[None]:
    """Errors of gRPC within become StarlingErrors."""
    try:
        yield
    except grpc.RpcError as error:
        raise starling_error(error) from error
