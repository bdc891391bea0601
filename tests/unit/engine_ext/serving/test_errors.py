"""The table of errors: its order, its codes against vLLM's HTTP statuses, and the status that a client gets."""

import pytest
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc import StatusCode
from vllm import exceptions
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from starling.engine_ext.serving.grpc.messages import (
    GRPC_CODES,
    DuplicateRequestError,
    TokenizeMemoryError,
    UploadMemoryError,
    error_status,
    field_path,
    grpc_code,
    root_cause,
)
from starling.v1 import inference_pb2 as pb

MADE_BY_HAND = {
    exceptions.QueueOverflowError: lambda: exceptions.QueueOverflowError(),
    exceptions.MaxQueuedTokensError: lambda: exceptions.MaxQueuedTokensError(),
    UploadMemoryError: lambda: UploadMemoryError(),
    TokenizeMemoryError: lambda: TokenizeMemoryError(),
    EngineDeadError: lambda: EngineDeadError(),
}


def make(kind: type[Exception]) -> Exception:
    return MADE_BY_HAND.get(kind, lambda: kind("why"))()


def names(row) -> str:
    return row[0].__name__


@pytest.mark.parametrize("row", GRPC_CODES, ids=names)
def test_each_row_is_reached(row):
    kind, code = row
    assert grpc_code(make(kind)) == code


# gRPC code -> the statuses of vLLM's HTTP server for the same errors.
HTTP_STATUSES = {
    StatusCode.INVALID_ARGUMENT: {400, 422},
    StatusCode.NOT_FOUND: {404},
    StatusCode.DEADLINE_EXCEEDED: {408},
    StatusCode.UNIMPLEMENTED: {501},
    StatusCode.RESOURCE_EXHAUSTED: {503},
    StatusCode.UNAVAILABLE: {500, 503},
    StatusCode.INTERNAL: {500},
}
# vLLM's HTTP server makes its own request ids, so none is a duplicate, and it reads no protobuf.
GRPC_ONLY = (DuplicateRequestError, DecodeError)


@pytest.mark.parametrize("row", [row for row in GRPC_CODES if row[0] not in GRPC_ONLY], ids=names)
def test_vllm_sends_an_http_status_of_the_same_meaning(row):
    kind, code = row
    assert create_error_response(make(kind)).error.code in HTTP_STATUSES[code]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (exceptions.VLLMValidationError("x"), StatusCode.INVALID_ARGUMENT),
        (exceptions.LoRAAdapterNotFoundError("a", "b"), StatusCode.NOT_FOUND),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), StatusCode.INVALID_ARGUMENT),
        (RuntimeError("a bug"), StatusCode.INTERNAL),
        (KeyError("a bug"), StatusCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_subclasses_and_unlisted_classes(error, code):
    assert grpc_code(error) == code


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (ValueError("bad"), StatusCode.INVALID_ARGUMENT),
        (RuntimeError("bug"), StatusCode.INTERNAL),
        (None, StatusCode.INTERNAL),
    ],
    ids=["bad input", "bug", "no cause"],
)
def test_bad_input_that_the_engine_wrapped_is_not_internal(cause, code):
    wrapped = EngineGenerateError()
    wrapped.__cause__ = cause
    assert grpc_code(root_cause(wrapped)) == code


@pytest.mark.parametrize(
    ("parameter", "text", "path"),
    [
        ("star", "star=7 is refused", "star.mode"),
        ("star_block_size", "star_block_size=3 is refused", "star.block_size"),
        ("temperature", "temperature must be finite", "sampling.temperature"),
        (None, "presence_penalty must be in [-2, 2], got 3.0.", "sampling.presence_penalty"),
        ("cache_salt", "Parameter 'cache_salt' must be ...", "cache_salt"),
        ("token_ids", "Token id 9 is out of vocabulary", "token_ids"),
        ("input_tokens", "This model's maximum context length is 8", "text"),
        (None, "The decoder prompt cannot be empty", "text"),
    ],
)
def test_field_path(parameter, text, path):
    assert field_path(parameter, text, "text") == path


@pytest.mark.parametrize("field", pb.SamplingParams.DESCRIPTOR.fields_by_name)
def test_every_sampling_field_has_a_path(field):
    assert field_path(field, "why", "text") == f"sampling.{field}"


def test_bad_request_names_the_field_and_repeats_the_message():
    error = exceptions.VLLMValidationError("star_block_size=3 is refused: why.", parameter="star_block_size", value=3)
    status = error_status(error, StatusCode.INVALID_ARGUMENT, "text")
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    (violation,) = details.field_violations
    assert (violation.field, violation.description) == (
        "star.block_size",
        "star_block_size=3 is refused: why.",
    )
    assert status.message == violation.description, "not vLLM's str(), which adds the parameter once more"


def test_other_codes_carry_no_bad_request():
    status = error_status(EngineDeadError(), StatusCode.UNAVAILABLE, "text")
    assert (status.code, len(status.details)) == (StatusCode.UNAVAILABLE.value[0], 0)


def test_a_dead_engine_has_the_text_of_vllms_http_server():
    status = error_status(EngineDeadError(), StatusCode.UNAVAILABLE, "text")
    assert status.message == create_error_response(EngineDeadError()).error.message
