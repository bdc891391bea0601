"""Bounds of what a client sends and is told, in one place: docs/security.md lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError

MAX_ERROR_BYTES = 1024
"""Bytes of UTF-8 of an error's message. gRPC sends it three times with 8 KiB of metadata in all."""

MAX_CHOICES = 128
"""Of one request (`n`), and beams of a beam search, where MAX_CHOICES_ENV says nothing else. vLLM's default is 16,384,
whose end takes the front over a minute."""

MAX_CHOICES_ENV = "VLLM_MAX_N_SEQUENCES"
"""vLLM's environment variable: its SamplingParams refuse more choices, and name the variable."""

CUT = " [... a part of this message is left out ...] "


@dataclass(frozen=True)
class Bound:
    """The size of one field of a request.

    Attributes:
        field: its name in starling.v1.
        limit: the largest size.
        unit: of the limit.
    """

    field: str
    limit: int
    unit: str

    def check(self, size: int) -> None:
        """Check the field's size (raises VLLMValidationError: it is above the limit)."""
        if size > self.limit:
            reason = f"it has {size} {self.unit}, and may have {self.limit} at most"
            raise VLLMValidationError(f"{self.field} is refused: {reason}.", parameter=self.field)


REQUEST_ID = Bound("request_id", 256, "characters")
LORA_NAME = Bound("lora_name", 256, "characters")
SAMPLING = Bound("sampling", 256 * 2**10, "bytes")
EXTRA_ARGS = Bound("extra_args", 64 * 2**10, "characters")
LOGIT_BIAS = Bound("logit_bias", 16384, "tokens")
BOUNDS = (REQUEST_ID, LORA_NAME, SAMPLING, EXTRA_ARGS, LOGIT_BIAS)
"""Of a gRPC request. So is the number of `segment_offsets`, whose bound is the model's context."""


def check_request(request: Any, max_model_len: int) -> None:
    """Check the fields of a gRPC request before one of them is parsed, which holds up the event loop.

    Args:
        request: a GenerateStreamRequest, or a message with its fields.
        max_model_len: of the model.

    Raises:
        VLLMValidationError: a field is above its bound.
    """
    REQUEST_ID.check(len(request.request_id))
    LORA_NAME.check(len(request.lora_name))
    EXTRA_ARGS.check(len(request.sampling.extra_args))
    LOGIT_BIAS.check(len(request.sampling.logit_bias))
    SAMPLING.check(request.sampling.ByteSize())
    Bound("segment_offsets", max_model_len, "offsets").check(len(request.star.segment_offsets))


def shortened(text: str) -> str:
    """A message for a client: the text, or, of one above MAX_ERROR_BYTES, its start and its end."""
    if len(text) <= MAX_ERROR_BYTES and len(text.encode(errors="surrogatepass")) <= MAX_ERROR_BYTES:
        return text
    half = (MAX_ERROR_BYTES - len(CUT)) // 2
    start = text[:half].encode(errors="replace")[:half].decode(errors="ignore")
    return start + CUT + text[-half:].encode(errors="replace")[-half:].decode(errors="ignore")
