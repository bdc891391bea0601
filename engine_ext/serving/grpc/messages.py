"""Functions shared by the gRPC services: a message's set fields, star options, errors and their status codes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NoReturn

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import StatusCode
from grpc_status import rpc_status
from vllm.exceptions import (
    GenerationError,
    GracefulHTTPError,
    MaxQueuedTokensError,
    QueueOverflowError,
    RetryableRequestError,
    VLLMClientError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from starling.config.parsing import shown
from starling.config.star import FIELD_OF, flat_name
from starling.engine_ext.front.bounds import shortened
from starling.scheduler.planning.rules import SEGMENTS
from starling.v1 import inference_pb2 as pb


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


logger = init_logger("vllm.starling")

MODES = {pb.StarOptions.MODE_OFF: "off", pb.StarOptions.MODE_ON: "on", pb.StarOptions.MODE_AUTO: "auto"}
RETRY_SECONDS = 1
# gRPC's own retry policy of a client obeys this metadata; RetryInfo is for the client's program.
PUSHBACK = ("grpc-retry-pushback-ms", str(RETRY_SECONDS * 1000))


def given(message: Message) -> dict[str, Any]:
    """Return the fields of a message that the client set, by name; repeated fields only if they are not empty."""
    return {field.name: list(value) if field.is_repeated else value for field, value in message.ListFields()}


def star_args(message: pb.StarOptions) -> dict[str, Any]:
    """Return the star options that the client set, under their flat names of SamplingParams.extra_args.

    A mode without a name in this version stays a number, which parse_options refuses. ``replicas`` 0 means auto.

    Raises:
        VLLMValidationError: two fields say where documents start.
    """
    values = given(message)
    mode = values.pop("mode", pb.StarOptions.MODE_UNSPECIFIED)
    if mode != pb.StarOptions.MODE_UNSPECIFIED:
        values["mode"] = MODES.get(mode, mode)
    if values.get("replicas") == 0:
        values["replicas"] = "auto"
    offsets = values.pop("segment_offsets", None)
    if offsets is not None:
        if "segments" in values:
            reason = "segments already says where documents start. Allowed: one of the two"
            raise VLLMValidationError(f"segment_offsets={shown(offsets)} is refused: {reason}.", parameter=SEGMENTS)
        values["segments"] = offsets
    if "shards" in values:
        values["shards"] = "on" if values["shards"] else "off"
    if "adapter" in values:
        values["adapter"] = "auto" if values["adapter"] else "off"
    if "retention" in values:
        words = values["retention"]
        values["retention"] = words[0] if len(words) == 1 else words
    return {flat_name(field): value for field, value in values.items()}


def field_path(parameter: str | None, text: str, otherwise: str) -> str:
    """Return the request's field that an error is about: ``star.block_size``, ``sampling.top_p``, ``text``.

    vLLM names the parameter of some errors only. Other messages start with the parameter.

    Args:
        parameter: the parameter that vLLM names.
        text: the error's message, not empty.
        otherwise: the field for errors that name no known parameter, mostly the prompt.
    """
    name = parameter or text.split(maxsplit=1)[0]
    offsets = (f"{SEGMENTS}=(", f"{SEGMENTS}=[", "segment_offsets=")
    if name == "segment_offsets" or (name == SEGMENTS and text.startswith(offsets)):
        return "star.segment_offsets"
    if name in FIELD_OF:
        return f"star.{FIELD_OF[name]}"
    if name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling.{name}"
    known = (pb.GenerateStreamRequest, pb.GenerateUploadStreamRequest)
    return name if any(name in message.DESCRIPTOR.fields_by_name for message in known) else otherwise


def error_status(error: Exception, code: StatusCode, otherwise: str) -> status_pb2.Status:
    """Return a status with the exception's message, shortened.

    For INVALID_ARGUMENT, a google.rpc.BadRequest names the field. For RESOURCE_EXHAUSTED, a google.rpc.RetryInfo says
    when to try again.

    Args:
        error: the exception.
        code: gRPC code of the status.
        otherwise: the field for errors that name no known parameter, mostly the prompt.
    """
    # VLLMValidationError adds its parameter to str(); the BadRequest names the field already.
    # Since vLLM 0.33 an EngineDeadError has a text for clients beside the one for logs.
    text = (
        str(error.args[0]) if isinstance(error, VLLMValidationError) else getattr(error, "CLIENT_MESSAGE", str(error))
    )
    status = status_pb2.Status(code=code.value[0], message=shortened(text) or type(error).__name__)
    if status.code == code_pb2.INVALID_ARGUMENT:
        details = error_details_pb2.BadRequest()
        field = field_path(getattr(error, "parameter", None), status.message, otherwise)
        details.field_violations.add(field=field, description=status.message)
        status.details.add().Pack(details)
    elif status.code == code_pb2.RESOURCE_EXHAUSTED:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(RETRY_SECONDS)
        status.details.add().Pack(retry)
    return status


async def abort(context: Any, error: Exception, otherwise: str) -> NoReturn:
    """End a call with the status of an exception.

    Args:
        context: context of the call.
        error: the exception.
        otherwise: the request's field for errors that name no known parameter, mostly the prompt.

    Raises:
        Exception: an exception of gRPC's own, which ends the call's coroutine.
    """
    code = grpc_code(error)
    if code is StatusCode.INTERNAL:
        logger.error("a gRPC call failed", exc_info=error)
    status = rpc_status.to_status(error_status(error, code, otherwise))
    metadata = status.trailing_metadata
    if code is StatusCode.RESOURCE_EXHAUSTED:
        metadata = (*metadata, PUSHBACK)
    await context.abort(status.code, status.details, metadata)
    raise AssertionError("abort has raised")
