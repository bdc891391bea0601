"""Mapping of exceptions to gRPC status codes. vLLM's own HTTP server answers the same exceptions over HTTP.

tests/unit/engine_ext/serving/test_errors.py compares the codes with vLLM's HTTP statuses, so that both fronts blame the
same side.
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
    """Error of a request with the id of a request that is still running."""


class DrainingError(GracefulHTTPError):
    """Error of a server that admits no more requests, because an operator called Drain."""

    def __init__(self, message: str = "the server is draining: it admits no more requests") -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class UploadMemoryError(GracefulHTTPError):
    """Error for uploads that would exceed the memory for uploads."""

    def __init__(self) -> None:
        message = "prompts that are being uploaded fill the memory for uploads, or this client's half of it; try again"
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class TokenizeMemoryError(GracefulHTTPError):
    """Error for texts that would exceed the memory for texts that wait for Tokenize."""

    def __init__(self) -> None:
        message = "texts of other calls wait for the tokenizer; try again"
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class SlowMessageError(GracefulHTTPError):
    """Error for a message that did not arrive in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.REQUEST_TIMEOUT)


# Most specific first: the first class that the exception is an instance of decides.
GRPC_CODES: tuple[tuple[type[Exception], StatusCode], ...] = (
    (DuplicateRequestError, StatusCode.ALREADY_EXISTS),
    (EngineDeadError, StatusCode.UNAVAILABLE),
    (EngineGenerateError, StatusCode.INTERNAL),
    (RetryableRequestError, StatusCode.UNAVAILABLE),
    (GenerationError, StatusCode.INTERNAL),
    (DrainingError, StatusCode.UNAVAILABLE),
    (QueueOverflowError, StatusCode.RESOURCE_EXHAUSTED),
    (UploadMemoryError, StatusCode.RESOURCE_EXHAUSTED),
    (TokenizeMemoryError, StatusCode.RESOURCE_EXHAUSTED),
    (SlowMessageError, StatusCode.DEADLINE_EXCEEDED),
    (MaxQueuedTokensError, StatusCode.RESOURCE_EXHAUSTED),
    (VLLMNotFoundError, StatusCode.NOT_FOUND),
    (VLLMUnprocessableEntityError, StatusCode.INVALID_ARGUMENT),
    (VLLMClientError, StatusCode.INVALID_ARGUMENT),
    (NotImplementedError, StatusCode.UNIMPLEMENTED),
    # A client sent bytes that are not a message of the called method.
    (DecodeError, StatusCode.INVALID_ARGUMENT),
    # vLLM refuses some input with Python's own exceptions.
    (ValueError, StatusCode.INVALID_ARGUMENT),
    (TypeError, StatusCode.INVALID_ARGUMENT),
    (OverflowError, StatusCode.INVALID_ARGUMENT),
)


def root_cause(error: Exception) -> Exception:
    """Return the exception to report: AsyncLLM.generate wraps an input's ValueError in an EngineGenerateError."""
    cause = error.__cause__
    return cause if isinstance(error, EngineGenerateError) and isinstance(cause, (ValueError, TypeError)) else error


def grpc_code(error: Exception) -> StatusCode:
    """Return the gRPC code of an exception, or INTERNAL for a class that the table does not list."""
    return next((code for kind, code in GRPC_CODES if isinstance(error, kind)), StatusCode.INTERNAL)
