"""What the gRPC services share: a message's set fields, star options, and how an error is told. Pure functions."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import StatusCode
from vllm.exceptions import VLLMValidationError

from scheduler.options import FIELD_OF, flat_name
from starling.v1 import inference_pb2 as pb

MODES = {pb.StarOptions.MODE_OFF: "off", pb.StarOptions.MODE_ON: "on", pb.StarOptions.MODE_AUTO: "auto"}
RETRY_SECONDS = 1


def given(message: Message) -> dict[str, Any]:
    """The fields of a message that the client set, by name; lists where they hold something."""
    return {field.name: list(value) if field.is_repeated else value for field, value in message.ListFields()}


def star_args(message: pb.StarOptions) -> dict[str, Any]:
    """The star options that the client set, under the flat names they have in SamplingParams.extra_args.

    A mode this version has no name for stays a number, which parse_options refuses. No replicas means auto.
    """
    values = given(message)
    mode = values.pop("mode", pb.StarOptions.MODE_UNSPECIFIED)
    if mode != pb.StarOptions.MODE_UNSPECIFIED:
        values["mode"] = MODES.get(mode, mode)
    if values.get("replicas") == 0:
        values["replicas"] = "auto"
    if "shards" in values:
        values["shards"] = "on" if values["shards"] else "off"
    return {flat_name(field): value for field, value in values.items()}


def field_path(parameter: str | None, text: str, otherwise: str) -> str:
    """The request's field that an error is about: ``star.block_size``, ``sampling.top_p``, ``text``.

    vLLM names the parameter of some errors only; of the others the message starts with it, or is about what
    ``otherwise`` names: the prompt, mostly.
    """
    name = parameter or text.split(maxsplit=1)[0]
    if name in FIELD_OF:
        return f"star.{FIELD_OF[name]}"
    if name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling.{name}"
    known = (pb.GenerateStreamRequest, pb.GenerateUploadStreamRequest)
    return name if any(name in message.DESCRIPTOR.fields_by_name for message in known) else otherwise


def error_status(error: Exception, code: StatusCode, otherwise: str) -> status_pb2.Status:
    """A status with the exception's message. Bad input also names the field in a google.rpc.BadRequest, overload
    says in a google.rpc.RetryInfo when to try again."""
    # VLLMValidationError adds its parameter to str(); the violation says it already.
    text = str(error.args[0]) if isinstance(error, VLLMValidationError) else str(error)
    status = status_pb2.Status(code=code.value[0], message=text or type(error).__name__)
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
