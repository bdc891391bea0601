"""Parameters that vLLM accepts and then fails on, reported as errors of the client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError

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
