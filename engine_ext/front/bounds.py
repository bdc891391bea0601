"""Bounds on the sizes of clients' requests and of error messages, and what requests may not have (docs/security.md)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from vllm.exceptions import VLLMValidationError

MAX_ERROR_BYTES = 1024
"""Largest size of an error message in bytes of UTF-8. gRPC sends it three times within 8 KiB of metadata."""

MAX_CHOICES = 128
"""Largest number of choices of a request (`n`), or of beams of a beam search, unless MAX_CHOICES_ENV sets another one.

vLLM's default is 16,384, which takes the front over a minute to finish.
"""

MAX_CHOICES_ENV = "VLLM_MAX_N_SEQUENCES"
"""Environment variable of vLLM: its SamplingParams refuse more choices, and name the variable."""

CUT = " [... a part of this message is left out ...] "


@dataclass(frozen=True)
class Bound:
    """Upper bound of one field of a request.

    Attributes:
        field: name of the field in vLLM's API, or in starling.v1.
        limit: the largest allowed size.
        unit: unit of the limit.
        fronts: the fronts that have the field.
    """

    field: str
    limit: int
    unit: str
    fronts: str = "HTTP and gRPC"

    def check(self, size: int) -> None:
        """Check the field's size (raises VLLMValidationError if it is above the limit)."""
        if size > self.limit:
            reason = f"it has {size} {self.unit}, and may have {self.limit} at most"
            raise VLLMValidationError(f"{self.field} is refused: {reason}.", parameter=self.field)


GRPC, HTTP = "gRPC", "HTTP"
REQUEST_ID = Bound("request_id", 256, "characters")
LORA_NAME = Bound("lora_name", 256, "characters", GRPC)
SESSION_ID = Bound("session_id", 256, "characters", GRPC)
SAMPLING = Bound("sampling", 256 * 2**10, "bytes", GRPC)
EXTRA_ARGS = Bound("extra_args", 64 * 2**10, "characters", GRPC)
KV_TRANSFER = Bound("kv_transfer_params_json", 128 * 2**10, "characters", GRPC)
LOGIT_BIAS = Bound("logit_bias", 16384, "tokens")
STOP = Bound("stop", 256, "strings")
STOP_TOKENS = Bound("stop_token_ids", 4096, "tokens")
BAD_WORDS = Bound("bad_words", 1024, "strings")
BAD_WORDS_TEXT = Bound("bad_words", 64 * 2**10, "characters in all")
CHOICES = Bound("structured_outputs.choice", 1024, "choices")
GRAMMARS = tuple(
    Bound(f"structured_outputs.{kind}", 32 * 2**10, "characters in all")
    for kind in ("choice", "json", "regex", "grammar", "structural_tag")
)
BODY = Bound("the body", 32 * 2**20, "bytes", HTTP)
TOKEN_VALUES = Bound("token ids", 2**18, "values, or twice `max_model_len`", HTTP)
SCORING_BODY = Bound("the body of `/generative_scoring`", 2**19, "bytes", HTTP)
HEAD = Bound("the head", 2**16, "bytes", HTTP)
SEQUENCES = Bound("prompts times choices", 1024, "sequences", HTTP)
PROMPT_LOGPROBS = Bound("prompt tokens times (`prompt_logprobs` + 1) times `n`", 2**19, "values")
OTHER_VALUES = Bound("all other fields", 2**14, "values", HTTP)
FIELDS = Bound("the message", 2**15, "fields", GRPC)
UPLOAD = Bound("the upload", 2**12, "pieces", GRPC)

DOCUMENTS = Bound("documents of `WarmDocuments`", 256, "documents", GRPC)
DOCUMENTS_AT_ONCE = Bound("concurrency of `WarmDocuments`", 8, "documents", GRPC)

PARAMS_BOUNDS = (LOGIT_BIAS, STOP, STOP_TOKENS, BAD_WORDS, BAD_WORDS_TEXT, CHOICES, *GRAMMARS)
BOUNDS = (
    *(HEAD, BODY, SCORING_BODY, TOKEN_VALUES, OTHER_VALUES, SEQUENCES, FIELDS, UPLOAD),
    *(REQUEST_ID, LORA_NAME, SESSION_ID, SAMPLING, EXTRA_ARGS, KV_TRANSFER),
    *PARAMS_BOUNDS,
    *(PROMPT_LOGPROBS, DOCUMENTS, DOCUMENTS_AT_ONCE),
)
"""All bounds except MAX_CHOICES and the number of `segment_offsets` over gRPC, which the model's context bounds."""


def check_request(request: Any, max_model_len: int) -> None:
    """Check the sizes of a gRPC request's fields before any field is parsed, because parsing blocks the event loop.

    Args:
        request: a GenerateStreamRequest, or a message with its fields.
        max_model_len: length of the model's context in tokens.

    Raises:
        VLLMValidationError: a field is above its bound.
    """
    REQUEST_ID.check(len(request.request_id))
    LORA_NAME.check(len(request.lora_name))
    SESSION_ID.check(len(request.session_id))
    EXTRA_ARGS.check(len(request.sampling.extra_args))
    LOGIT_BIAS.check(len(request.sampling.logit_bias))
    SAMPLING.check(request.sampling.ByteSize())
    Bound("segment_offsets", max_model_len, "offsets").check(len(request.star.segment_offsets))


def check_params(params: Any) -> None:
    """Check the sizes of a request's sampling parameters, for both fronts, before the engine gets the request.

    A grammar is compiled in the engine core, where all requests with structured outputs wait for it. Bad words are
    tokenised in the event loop, and all clients wait for that: 20 MB took 5 seconds.

    Args:
        params: vLLM's SamplingParams, or the parameters of a pooling request, which have none of these fields.

    Raises:
        VLLMValidationError: a parameter is above its bound.
    """
    sizes = {
        LOGIT_BIAS: getattr(params, "logit_bias", None),
        STOP: getattr(params, "stop", None),
        STOP_TOKENS: getattr(params, "stop_token_ids", None),
        BAD_WORDS: getattr(params, "bad_words", None),
    }
    for bound, values in sizes.items():
        bound.check(1 if isinstance(values, str) else len(values or ()))
    BAD_WORDS_TEXT.check(num_characters(sizes[BAD_WORDS]))
    structured = getattr(params, "structured_outputs", None)
    if structured is None:
        return
    CHOICES.check(len(structured.choice or ()))
    for bound in GRAMMARS:
        bound.check(num_characters(getattr(structured, bound.field.rpartition(".")[2])))


def check_prompt_logprobs(num_tokens: int, params: Any) -> None:
    """Check how many prompt log-probabilities a request asks for, because the event loop converts them to text.

    Each choice has its own: 4,000 tokens with 20 log-probabilities each and 128 choices blocked the loop for 14
    seconds.

    Raises:
        VLLMValidationError: the request asks for too many.
    """
    number = getattr(params, "prompt_logprobs", None)
    if number is not None:
        PROMPT_LOGPROBS.check(num_tokens * (max(number, 0) + 1) * params.n)


def bounded_text(renderer: Any, text: str, params: Any) -> Any:
    """Check that a model's context could hold a text, before it is tokenised.

    vLLM checks this only if a request names the model's context and does not truncate. Its `/tokenize` does not check:
    a text of 60 MB took over 10 GB. A text that is to be truncated is cut first, as vLLM does it if the request names a
    side.

    Args:
        renderer: vLLM's renderer.
        text: a prompt, possibly made by a chat template.
        params: vLLM's TokenizeParams.

    Returns:
        The parameters, with the side on which a too long text is cut.

    Raises:
        VLLMValidationError: the text makes more tokens than the context has, and is not truncated.
    """
    if renderer.tokenizer is None:
        return params
    tokens = renderer.model_config.max_model_len
    characters = tokens * renderer.tokenizer.max_chars_per_token
    if len(text) <= characters:
        return params
    if params.truncate_prompt_tokens is None:
        reason = f"{characters} make more tokens than the {tokens} of the model's context"
        raise VLLMValidationError(f"The prompt has {len(text)} characters; {reason}.", parameter="prompt")
    side = params.truncation_side or getattr(renderer.tokenizer, "truncation_side", "right")
    return replace(params, truncation_side=side)


def num_characters(value: Any) -> int:
    """Return the number of characters of a text, of a list's texts, or of an object's JSON; 0 for None."""
    if isinstance(value, list):
        return sum(len(text) for text in value)
    if isinstance(value, dict):
        return len(json.dumps(value))
    return len(value or "")


def shortened(text: str) -> str:
    """Return a message for a client: the text, or only its start and end if it is longer than MAX_ERROR_BYTES."""
    if len(text) <= MAX_ERROR_BYTES and len(text.encode(errors="surrogatepass")) <= MAX_ERROR_BYTES:
        return text
    half = (MAX_ERROR_BYTES - len(CUT)) // 2
    start = text[:half].encode(errors="replace")[:half].decode(errors="ignore")
    return start + CUT + text[-half:].encode(errors="replace")[-half:].decode(errors="ignore")


TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
"""Keys of extra_args that vLLM itself reads. It fails if a value is not an object."""

NO_TOKEN = (
    "The engine ended the output: no token is left that both allowed_token_ids and structured_outputs allow. Leave out "
    "one of the two, or allow the tokens of the structured output."
)

NO_GRAMMAR = (
    "the engine could not make a grammar of it, or the grammar leaves no token, as where a rule or schema refers to "
    "nothing but itself. The server's log says which. Allowed: a constraint that some text satisfies"
)
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Fields of vLLM's StructuredOutputsParams. A request sets one of them."""


def check_transfer_params(extra_args: Mapping[str, Any] | None) -> None:
    """Check the values of TRANSFER_KEYS (raises VLLMValidationError if one is not an object)."""
    for key in TRANSFER_KEYS:
        value = (extra_args or {}).get(key)
        if value is not None and not isinstance(value, Mapping):
            reason = f"it must be an object, not {type(value).__name__}"
            raise VLLMValidationError(f"{key} is refused: {reason}.", parameter=key)


def constraint_error(params: Any) -> VLLMValidationError | None:
    """Return the error to answer if the engine ends an output with an error, or None if no constraint is the reason.

    vLLM's front checks a constraint's syntax. The engine core makes the grammar: this may fail (`root ::= root root`),
    or leave no token (`{"$ref": "#"}`), and then vLLM samples a token that the grammar rejects. Its server answers 500
    to both.
    """
    structured = getattr(params, "structured_outputs", None)
    if not structured:
        return None
    if getattr(params, "allowed_token_ids", None):
        return VLLMValidationError(NO_TOKEN, parameter="allowed_token_ids")
    kinds = [kind for kind in CONSTRAINTS if getattr(structured, kind)]
    name = ".".join(["structured_outputs", *kinds])
    return VLLMValidationError(f"{name} is refused: {NO_GRAMMAR}.", parameter=name)


async def with_reason(outputs: AsyncGenerator[Any, None], error: Exception) -> AsyncGenerator[Any, None]:
    """Yield the outputs of a request with a constraint (raises ``error`` if the engine ended a choice with one)."""
    async with aclosing(outputs):
        async for output in outputs:
            if any(choice.finish_reason == "error" for choice in output.outputs):
                raise error
            yield output
