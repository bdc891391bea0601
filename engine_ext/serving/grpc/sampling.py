"""Conversion of starling.v1's sampling parameters to vLLM's. Pure functions."""

from __future__ import annotations

import json
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from starling.config.star import is_star_key
from starling.engine_ext.front.bounds import TRANSFER_KEYS
from starling.engine_ext.front.misplaced import is_preset, nearly
from starling.engine_ext.serving.grpc.messages import given
from starling.v1 import inference_pb2 as pb

MAX_BIAS = 100.0
MAX_NESTING = 64  # levels of extra_args: far below the limit of the transport to the engine
MAX_SEED = 2**63 - 1
TEXT_FIELDS = ("stop", "bad_words", "skip_special_tokens", "structured_outputs")
"""Fields that need the server's tokenizer."""


def sampling_params(
    message: pb.SamplingParams, defaults: dict[str, Any], max_tokens: int, star: dict[str, Any]
) -> SamplingParams:
    """Return vLLM's sampling parameters, which stream deltas.

    Args:
        message: the client's sampling parameters.
        defaults: the model's generation config, as ModelConfig.get_diff_sampling_param gives it.
        max_tokens: largest number of tokens to generate, resolved against the context.
        star: the star options under their flat names, as star_args gives them.

    Raises:
        VLLMValidationError: a value can't be used.
    """
    values = defaults | given(message) | {"max_tokens": max_tokens}
    values["stop_token_ids"] = [*message.stop_token_ids, *defaults.get("stop_token_ids", [])]
    if message.HasField("structured_outputs"):
        values["structured_outputs"] = structured_outputs(message.structured_outputs)
    if message.logit_bias:
        values["logit_bias"] = logit_bias(message)
    n = max(message.n, 1)
    if message.seed + n - 1 > MAX_SEED:
        reason = f"choice i has seed + i, which with n={n} exceeds 2^63 - 1"
        raise VLLMValidationError(f"seed={message.seed} is refused: {reason}", parameter="seed")
    own = values.pop("extra_args", None)
    extra_args = star if own is None else parse_extra_args(own) | star
    return SamplingParams(
        **values,
        extra_args=extra_args or None,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # made for this one request
    )


def structured_outputs(message: pb.StructuredOutputs) -> StructuredOutputsParams:
    """Return the constraint in vLLM's form (raises VLLMValidationError if there is none, or it is empty)."""
    kind = message.WhichOneof("constraint")
    if kind == "json_schema":
        return StructuredOutputsParams(json=message.json_schema)
    if kind == "regex":
        return StructuredOutputsParams(regex=message.regex)
    if kind == "choices" and message.choices.choices and "" not in message.choices.choices:
        return StructuredOutputsParams(choice=list(message.choices.choices))
    reason = "choices needs texts, and no text may be empty" if kind else "set json_schema, regex or choices"
    raise VLLMValidationError(f"structured_outputs is refused: {reason}", parameter="structured_outputs")


def logit_bias(message: pb.SamplingParams) -> dict[int, float]:
    """Return biases by token id (raises VLLMValidationError if a bias is not from -100 to 100)."""
    # vLLM's HTTP server silently clips a bias to these limits.
    for token_id, bias in message.logit_bias.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            reason = f"logit_bias={bias} of token {token_id} is refused: it is not from -100 to 100"
            raise VLLMValidationError(reason, parameter="logit_bias")
    return dict(message.logit_bias)


def parse_extra_args(text: str) -> dict[str, Any]:
    """Parse the JSON object of extra_args. vLLM itself refuses integers of more than 64 bits.

    Raises:
        VLLMValidationError: the text is not a JSON object, is nested too deeply, or has keys that are not allowed.
    """

    def refused(reason: str) -> VLLMValidationError:
        return VLLMValidationError(f"extra_args is refused: {reason}", parameter="extra_args")

    def refuse_constant(name: str) -> None:
        raise ValueError(f"JSON has no {name}")

    try:
        values = json.loads(text, parse_constant=refuse_constant)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    except (ValueError, RecursionError) as error:
        raise refused(f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise refused("it is not a JSON object")
    if is_deep(values):
        raise refused(f"it is nested more than {MAX_NESTING} levels deep")
    for key in values:
        if is_star_key(key) or nearly(key) is not None:
            raise refused(f"{key!r} is an option of Star Attention, which has the request's field `star`")
        if is_preset(key, values[key]):
            raise refused(f"{key!r} is an option of the server, --{key}, and not of a request")
        if key in TRANSFER_KEYS:  # which gRPC's responses lack
            raise refused(f"{key!r} belongs to disaggregated serving, which is not served over gRPC")
    return values


def is_deep(values: Any) -> bool:
    """Return whether JSON values are nested more than MAX_NESTING levels deep."""
    level = [values]
    for _ in range(MAX_NESTING):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [value for values in inner for value in values]
    return any(isinstance(node, (dict, list)) for node in level)


def constraint_path(message: pb.SamplingParams) -> str | None:
    """Return the field that constrains the output, to name it in an error, or None if no field does."""
    kind = message.structured_outputs.WhichOneof("constraint")
    return None if kind is None else f"sampling.structured_outputs.{kind}"
