"""Account of the requests. Each is answered, refused with a documented status, or left by its client."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.machine import Pause, was_paused

ANSWERED, REFUSED, ABORTED, LEFT, DIFFERENT = "answered", "refused", "aborted", "left", "different answer"
FULL = frozenset({"HTTP 429", "HTTP 503", "RESOURCE_EXHAUSTED"})
MAX_DETAILS = 20
PAUSE_SECONDS, AFTER_SECONDS = 1.0, 10.0
"""The pause of the machine that may end a request, and so long after it deadlines pass that nobody could keep."""


@dataclass(frozen=True)
class Loss:
    """A request whose outcome its kind does not have; it took from ``start`` to ``end`` of time.monotonic()."""

    kind: str
    outcome: str
    detail: str
    start: float
    end: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.outcome}: {self.detail}"


@dataclass
class Ledger:
    """Requests by kind and outcome.

    Attributes:
        outcomes: kind -> outcome -> number.
        pauses: moments in which the machine stood still (machine.py).
        losses: requests whose outcome their kind does not have, those of such moments too.
        different: answers that are not the reference's; they are lost too.
        not_sent: arrivals for which no client was free.
        differences: descriptions of the first different answers.
    """

    pauses: Sequence[Pause] = ()

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    losses: list[Loss] = field(default_factory=list)
    different: int = 0
    checked: int = 0
    not_sent: int = 0
    differences: list[str] = field(default_factory=list)

    def record(
        self, kind: str, outcome: str, detail: str, accepts: frozenset[str], start: float = 0, end: float = 0
    ) -> None:
        """Count a request.

        Args:
            outcome: one of the words above, an HTTP status, a gRPC code, or an exception's type.
            detail: text to show of a lost request.
            accepts: outcomes that such a request may have, besides those of a full server.
            start, end: times at which it was sent and ended, by time.monotonic().
        """
        self.outcomes[kind][outcome] += 1
        if outcome in accepts or outcome in FULL:
            return
        self.different += outcome == DIFFERENT
        self.losses.append(Loss(kind, outcome, detail, start, end))

    @property
    def lost(self) -> int:
        """Return the number of requests that are lost, without those that ``delayed`` has."""
        return len(self.losses) - len(self.delayed)

    @property
    def delayed(self) -> list[Loss]:
        """Return the requests that were lost while the machine stood still, or right after it.

        Those with a wrong answer are never among them.
        """
        return [loss for loss in self.losses if self._is_delayed(loss)]

    @property
    def details(self) -> list[str]:
        """Return details of the first lost requests."""
        return [str(loss) for loss in self.losses if not self._is_delayed(loss)][:MAX_DETAILS]

    def _is_delayed(self, loss: Loss) -> bool:
        return loss.outcome != DIFFERENT and was_paused(
            self.pauses, loss.start, loss.end, least=PAUSE_SECONDS, after=AFTER_SECONDS
        )

    @property
    def requests(self) -> int:
        """Return the number of all requests that were sent."""
        return sum(counts.total() for counts in self.outcomes.values())

    def as_json(self) -> Mapping[str, Any]:
        """Return the numbers, with kinds and outcomes in alphabetical order."""
        return {
            "sent": self.requests,
            "lost": self.lost,
            "lost_while_the_machine_stood_still": len(self.delayed),
            "answers_checked": self.checked,
            "answers_different": self.different,
            "not_sent": self.not_sent,
            "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.outcomes.items())},
            "details": self.details,
            "details_while_the_machine_stood_still": [str(loss) for loss in self.delayed[:MAX_DETAILS]],
            "differences": self.differences[:MAX_DETAILS],
        }
