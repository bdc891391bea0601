"""Outcome of a played trace, as its clients have seen it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """Outcome of a played trace; times are in seconds.

    Attributes:
        first_tokens: time from a request's arrival to its first token.
        pauses: times between two tokens of an answer.
        seconds: time from the first request to the last token.
    """

    first_tokens: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    preemptions: int = 0

    def summary(self) -> dict[str, Any]:
        first, pauses = np.array(self.first_tokens), np.array(self.pauses)
        return {
            "first_token_p50": float(np.quantile(first, 0.5)),
            "first_token_p90": float(np.quantile(first, 0.9)),
            "first_token_p99": float(np.quantile(first, 0.99)),
            "pause_p50": float(np.quantile(pauses, 0.5)),
            "pause_p99": float(np.quantile(pauses, 0.99)),
            "pause_p999": float(np.quantile(pauses, 0.999)),
            "tokens_per_second": self.output_tokens / self.seconds,
            "cached": self.cached_tokens / self.prompt_tokens,
            "seconds": self.seconds,
            "requests": len(self.first_tokens),
            "steps": self.steps,
            "preemptions": self.preemptions,
        }
