"""The scores of a model's KV heads: how much of star's loss in answers each one causes.

`starling calibrate` makes the file. DuoAttention's files (arXiv 2410.10819), a line of numbers for each layer, are read
too.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

DIGEST_LENGTH = 16


class ScoresError(ValueError):
    """A file that has no scores of KV heads, or not those of the model."""


class HeadScores(BaseModel):
    """Scores of all KV heads of a model.

    Attributes:
        scores: a score for each KV head of each layer; none for a layer that is not full attention.
        model: the model's name, for people.
        checkpoint: digest of the model's files, or None if it is not known.
        setup: description of how the scores were made.
        curve: measured (share of heads that are dense, divergence from the dense model).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: tuple[tuple[FiniteFloat, ...], ...] = Field(min_length=1)
    model: str = ""
    checkpoint: str | None = None
    setup: dict[str, Any] = {}
    curve: tuple[tuple[float, float], ...] = ()

    @cached_property
    def num_heads(self) -> int:
        return sum(map(len, self.scores))

    @cached_property
    def order(self) -> tuple[tuple[int, int], ...]:
        """Return all (layer, KV head)s, the highest score first.

        Of equal scores the lower layer comes first, then the lower head.
        """
        heads = ((layer, head) for layer, scores in enumerate(self.scores) for head in range(len(scores)))
        return tuple(sorted(heads, key=lambda at: (-self.scores[at[0]][at[1]], at)))

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Return, for each layer, the place of each of its KV heads in ``order``."""
        place = {head: rank for rank, head in enumerate(self.order)}
        return tuple(tuple(place[layer, head] for head in range(len(row))) for layer, row in enumerate(self.scores))

    def count(self, share: float) -> int:
        """Return the number of heads for a share of them: at least one, unless the share is 0."""
        return max(1, round(share * self.num_heads)) if share else 0

    @cached_property
    def order_digest(self) -> str:
        """Return a digest of the order of the heads.

        Two processes with equal digests make the same heads dense, whatever their number.
        """
        return hashlib.sha256(repr(self.order).encode()).hexdigest()[:DIGEST_LENGTH]

    def digest(self, count: int) -> str:
        """Return a digest of the set of the ``count`` highest heads: equal digests, equal sets."""
        return _digest(self.order, count)


@lru_cache(maxsize=64)
def _digest(order: tuple[tuple[int, int], ...], count: int) -> str:
    return hashlib.sha256(repr(sorted(order[:count])).encode()).hexdigest()[:DIGEST_LENGTH]


@lru_cache(maxsize=16)
def read_scores(path: str) -> HeadScores:
    """Read the scores in a file.

    Raises:
        ScoresError: it can't be read, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScoresError(f"the file can't be read: {error}") from None
    try:
        if text.lstrip().startswith("{"):
            return HeadScores.model_validate_json(text)
        rows = (line.replace(",", " ").split() for line in text.splitlines() if line.strip())
        return HeadScores(scores=tuple(tuple(map(float, row)) for row in rows))
    except ValidationError as error:
        first = error.errors()[0]
        raise ScoresError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ScoresError(f"neither JSON nor lines of numbers: {error}") from None
