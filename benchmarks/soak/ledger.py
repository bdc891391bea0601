"""What became of each request. Each is answered, refused with a documented status, or left by its client."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ANSWERED, REFUSED, ABORTED, LEFT, DIFFERENT = "answered", "refused", "aborted", "left", "different answer"
FULL = frozenset({"HTTP 429", "HTTP 503", "RESOURCE_EXHAUSTED"})
MAX_DETAILS = 20


@dataclass
class Ledger:
    """Requests by kind and outcome.

    Attributes:
        outcomes: kind -> outcome -> number.
        lost: requests whose outcome their kind does not have.
        different: answers that are not the reference's; they are lost too.
        not_sent: arrivals for which no client was free.
        details: of the first lost requests.
        differences: of the first different answers.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lost: int = 0
    different: int = 0
    checked: int = 0
    not_sent: int = 0
    details: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def record(self, kind: str, outcome: str, detail: str, accepts: frozenset[str]) -> None:
        """Count a request.

        Args:
            outcome: one of the words above, an HTTP status, a gRPC code, or an exception's type.
            detail: what to show of a lost request.
            accepts: outcomes that such a request may have, besides those of a full server.
        """
        self.outcomes[kind][outcome] += 1
        if outcome in accepts or outcome in FULL:
            return
        self.lost += 1
        self.different += outcome == DIFFERENT
        if len(self.details) < MAX_DETAILS:
            self.details.append(f"{kind}: {outcome}: {detail}")

    @property
    def requests(self) -> int:
        """All requests that were sent."""
        return sum(counts.total() for counts in self.outcomes.values())

    def as_json(self) -> Mapping[str, Any]:
        """The numbers, with kinds and outcomes in alphabetical order."""
        return {
            "sent": self.requests,
            "lost": self.lost,
            "answers_checked": self.checked,
            "answers_different": self.different,
            "not_sent": self.not_sent,
            "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.outcomes.items())},
            "details": self.details,
            "differences": self.differences[:MAX_DETAILS],
        }
