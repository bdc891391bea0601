"""What an exception means to a client: one table for gRPC and HTTP.

The HTTP column is what vLLM's own server answers, so that a client sees one behaviour on both fronts;
tests/unit/test_errors.py holds it against vLLM.
"""

from __future__ import annotations

from http import HTTPStatus

from google.protobuf.message import DecodeError
from grpc import StatusCode
from vllm.exceptions import (
    GenerationError,
    GracefulHTTPError,
    MaxQueuedTokensError,
    QueueOverflowError,
    RetryableRequestError,
    VLLMClientError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
)
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError


class DuplicateRequestError(ValueError):
    """A request has the id of one that is still running."""


class DrainingError(GracefulHTTPError):
    """An operator has told the server to admit no more requests."""

    def __init__(self, message: str = "the server is draining: it admits no more requests") -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class UploadRoomError(GracefulHTTPError):
    """Prompts that clients are uploading take all the room that there is for them."""

    def __init__(self) -> None:
        message = "prompts that other clients are uploading take all the room there is; try again"
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


# Most specific first: the first class that the exception is an instance of decides.
TABLE: tuple[tuple[type[Exception], StatusCode, HTTPStatus], ...] = (
    (DuplicateRequestError, StatusCode.ALREADY_EXISTS, HTTPStatus.CONFLICT),
    (EngineDeadError, StatusCode.UNAVAILABLE, HTTPStatus.INTERNAL_SERVER_ERROR),
    (EngineGenerateError, StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR),
    (RetryableRequestError, StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE),
    (GenerationError, StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR),
    (DrainingError, StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE),
    (QueueOverflowError, StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.SERVICE_UNAVAILABLE),
    (UploadRoomError, StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.SERVICE_UNAVAILABLE),
    (MaxQueuedTokensError, StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.SERVICE_UNAVAILABLE),
    (VLLMNotFoundError, StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND),
    (VLLMUnprocessableEntityError, StatusCode.INVALID_ARGUMENT, HTTPStatus.UNPROCESSABLE_ENTITY),
    (VLLMClientError, StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
    (NotImplementedError, StatusCode.UNIMPLEMENTED, HTTPStatus.NOT_IMPLEMENTED),
    # Bytes of a client that are no message of the called method. Ours alone: HTTP has no protobuf.
    (DecodeError, StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
    # vLLM still refuses some input with plain exceptions.
    (ValueError, StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
    (TypeError, StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
    (OverflowError, StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
)


def root(error: Exception) -> Exception:
    """The exception that tells: AsyncLLM.generate wraps a plain ValueError about its input in its own."""
    cause = error.__cause__
    return cause if isinstance(error, EngineGenerateError) and isinstance(cause, (ValueError, TypeError)) else error


def grpc_code(error: Exception) -> StatusCode:
    """The gRPC code of an exception; INTERNAL for one that the table does not know."""
    return next((code for kind, code, _ in TABLE if isinstance(error, kind)), StatusCode.INTERNAL)


def http_status(error: Exception) -> HTTPStatus:
    """The HTTP status of an exception; 500 for one that the table does not know."""
    return next((status for kind, _, status in TABLE if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)
