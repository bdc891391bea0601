"""Parameters that vLLM accepts and then fails with, as errors of the client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
"""Keys of extra_args that vLLM itself reads. It fails where the value is no object."""

NO_TOKEN = (
    "The engine ended the output: no token is left that both allowed_token_ids and structured_outputs allow. Leave out "
    "one of the two, or allow the tokens of the structured output."
)


def check_transfer_params(extra_args: Mapping[str, Any] | None) -> None:
    """Check the values of TRANSFER_KEYS (raises VLLMValidationError: one is no object)."""
    for key in TRANSFER_KEYS:
        value = (extra_args or {}).get(key)
        if value is not None and not isinstance(value, Mapping):
            reason = f"it must be an object, not {type(value).__name__}"
            raise VLLMValidationError(f"{key} is refused: {reason}.", parameter=key)


def are_at_odds(params: Any) -> bool:
    """Whether two parameters of a request say which tokens its output may have."""
    return bool(getattr(params, "structured_outputs", None) and getattr(params, "allowed_token_ids", None))


async def with_reason(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The engine's outputs of a request whose parameters ``are_at_odds``.

    Where both leave no token, vLLM samples one that the grammar rejects, and its server answers 500.

    Raises:
        VLLMValidationError: the engine ended a choice with an error.
    """
    async with aclosing(outputs):
        async for output in outputs:
            if any(choice.finish_reason == "error" for choice in output.outputs):
                raise VLLMValidationError(NO_TOKEN, parameter="allowed_token_ids")
            yield output
