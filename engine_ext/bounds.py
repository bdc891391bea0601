"""Bounds of what a client sends and is told, in one place: docs/security.md lists them."""

from __future__ import annotations

from dataclasses import dataclass

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
BOUNDS = (REQUEST_ID, LORA_NAME)


def shortened(text: str) -> str:
    """A message for a client: the text, or, of one above MAX_ERROR_BYTES, its start and its end."""
    if len(text) <= MAX_ERROR_BYTES and len(text.encode(errors="surrogatepass")) <= MAX_ERROR_BYTES:
        return text
    half = (MAX_ERROR_BYTES - len(CUT)) // 2
    start = text[:half].encode(errors="replace")[:half].decode(errors="ignore")
    return start + CUT + text[-half:].encode(errors="replace")[-half:].decode(errors="ignore")
