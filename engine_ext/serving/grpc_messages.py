"""Between the messages of starling.v1 and what vLLM takes and gives. Pure functions."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import StatusCode
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from scheduler.options import FIELD_OF, flat_name
from starling.v1 import inference_pb2 as pb

MODES = {pb.StarOptions.MODE_OFF: "off", pb.StarOptions.MODE_ON: "on", pb.StarOptions.MODE_AUTO: "auto"}
ATTENTION = {"dense": pb.Plan.ATTENTION_DENSE, "star": pb.Plan.ATTENTION_STAR}
FINISH_REASONS = {
    "stop": pb.Final.FINISH_REASON_STOP,
    "length": pb.Final.FINISH_REASON_LENGTH,
    "abort": pb.Final.FINISH_REASON_ABORT,
    "repetition": pb.Final.FINISH_REASON_REPETITION,
}


def given(message: Message) -> dict[str, Any]:
    """The fields of a message that the client set, by name; lists where they hold something."""
    return {field.name: list(value) if field.is_repeated else value for field, value in message.ListFields()}


def prompt_field(request: pb.GenerateStreamRequest) -> str:
    """The field that holds the prompt, to name in an error."""
    return request.WhichOneof("prompt") or "prompt"


def prompt_of(request: pb.GenerateStreamRequest) -> TextPrompt | TokensPrompt:
    """What to tokenise, or tokens (raises VLLMValidationError where there is no prompt)."""
    if request.text:
        return TextPrompt(prompt=request.text)
    if request.token_ids.ids:
        return TokensPrompt(prompt_token_ids=list(request.token_ids.ids))
    raise VLLMValidationError("The prompt is empty: set text or token_ids.", parameter=prompt_field(request))


def star_args(message: pb.StarOptions) -> dict[str, Any]:
    """The star options that the client set, under the flat names they have in SamplingParams.extra_args.

    A mode this version has no name for stays a number, which parse_options refuses.
    """
    values = given(message)
    mode = values.pop("mode", pb.StarOptions.MODE_UNSPECIFIED)
    if mode != pb.StarOptions.MODE_UNSPECIFIED:
        values["mode"] = MODES.get(mode, mode)
    return {flat_name(field): value for field, value in values.items()}


def sampling_params(
    message: pb.SamplingParams, defaults: dict[str, Any], max_tokens: int, extra_args: dict[str, Any]
) -> SamplingParams:
    """vLLM's sampling parameters, streaming deltas (raises VLLMValidationError).

    Args:
        defaults: the model's generation config, as ModelConfig.get_diff_sampling_param gives it.
        max_tokens: tokens to generate at most, resolved against the context.
    """
    values = defaults | given(message) | {"max_tokens": max_tokens}
    stop_token_ids = [*values.pop("stop_token_ids", []), *defaults.get("stop_token_ids", [])]
    return SamplingParams(
        **values,
        stop_token_ids=stop_token_ids,
        extra_args=extra_args or None,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # made for this one request
    )


def delta(output: CompletionOutput) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(delta=pb.Delta(text=output.text, token_ids=output.token_ids))


def final(output: CompletionOutput, usage: pb.Usage, plan: dict[str, Any]) -> pb.GenerateStreamResponse:
    """The last message of a stream. ``plan`` is what engine_ext.requests.describe says of it."""
    reason = FINISH_REASONS.get(output.finish_reason or "", pb.Final.FINISH_REASON_UNSPECIFIED)
    message = pb.Final(finish_reason=reason, usage=usage, plan=plan_message(plan))
    if isinstance(output.stop_reason, str):
        message.stop_string = output.stop_reason
    elif output.stop_reason is not None:
        message.stop_token_id = output.stop_reason
    return pb.GenerateStreamResponse(final=message)


def plan_message(plan: dict[str, Any]) -> pb.Plan:
    """A described plan as a message; the keys of a dense one, which its description leaves out, are added."""
    tokens = plan["prompt_tokens"]
    pairs = tokens * (tokens + 1) // 2
    dense = {"keys_attended": pairs, "dense_keys": pairs, "keys_per_context_token": (tokens + 1) / 2}
    values = plan if plan["attention"] == "star" else plan | dense
    return pb.Plan(**values | {"attention": ATTENTION[plan["attention"]]})


def field_path(parameter: str | None, text: str, prompt: str) -> str:
    """The request's field that an error is about: ``star.block_size``, ``sampling.top_p``, ``text``.

    vLLM names the parameter of some errors only; of the others the message starts with it, or is about
    the prompt, whose field is ``prompt``.
    """
    name = parameter or text.split(maxsplit=1)[0]
    if name in FIELD_OF:
        return f"star.{FIELD_OF[name]}"
    if name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling.{name}"
    return name if name in pb.GenerateStreamRequest.DESCRIPTOR.fields_by_name else prompt


def error_status(error: Exception, code: StatusCode, prompt: str) -> status_pb2.Status:
    """A status with the exception's message; bad input also names the field in a google.rpc.BadRequest."""
    # VLLMValidationError adds its parameter to str(); the violation says it already.
    text = str(error.args[0]) if isinstance(error, VLLMValidationError) else str(error)
    status = status_pb2.Status(code=code.value[0], message=text or type(error).__name__)
    if status.code == code_pb2.INVALID_ARGUMENT:
        details = error_details_pb2.BadRequest()
        field = field_path(getattr(error, "parameter", None), status.message, prompt)
        details.field_violations.add(field=field, description=status.message)
        status.details.add().Pack(details)
    return status
