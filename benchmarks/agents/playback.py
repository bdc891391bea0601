"""The sessions of a trace, played one turn after the other; how time passes and what a step is, subclasses say."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

from benchmarks.agents.conversation import Conversation, conversations
from benchmarks.agents.outcome import Outcome
from benchmarks.agents.trace import Session


class Playback(ABC):
    """Plays sessions on an engine or a scheduler.

    Attributes:
        live: request -> its session, and when it arrived.
        last_token: request -> when it got its last token.
    """

    def __init__(self) -> None:
        self.live: dict[str, tuple[Conversation, float]] = {}
        self.last_token: dict[str, float] = {}
        self.outcome = Outcome()

    def play(self, trace: list[Session]) -> Outcome:
        offset = self.time() - trace[0].start
        arrivals = [(offset + each.session.start, each.number, each) for each in conversations(trace)]
        heapq.heapify(arrivals)
        begin = arrivals[0][0]
        while arrivals or self.live:
            if not self.live:
                self.leap_to(arrivals[0][0])
            while arrivals and arrivals[0][0] <= self.time():
                arrived, _, conversation = heapq.heappop(arrivals)
                ids = conversation.prompt()
                self.outcome.prompt_tokens += len(ids)
                self.live[self.add(conversation, ids, arrived)] = conversation, arrived
            for conversation, pause in self.step():
                if conversation.turn is not None:
                    heapq.heappush(arrivals, (self.time() + pause, conversation.number, conversation))
        self.outcome.seconds = self.time() - begin
        return self.outcome

    @abstractmethod
    def time(self) -> float:
        """Seconds since some moment."""

    @abstractmethod
    def leap_to(self, moment: float) -> None:
        """Nothing happens until a moment, which may have passed."""

    @abstractmethod
    def add(self, conversation: Conversation, ids: list[int], arrived: float) -> str:
        """Add the request of a session's next turn; returns its id."""

    @abstractmethod
    def step(self) -> list[tuple[Conversation, float]]:
        """Run one step; returns the sessions whose answer has ended, and the seconds until their next turn."""

    def note(self, name: str, new_tokens: int, cached_tokens: int | None) -> None:
        """A request has got tokens.

        Args:
            cached_tokens: prompt tokens that were in the prefix cache; read with the first token only.
        """
        before, now = self.last_token.get(name), self.time()
        self.outcome.note(now, self.live[name][1], before, new_tokens)
        if before is None:
            self.outcome.cached_tokens += cached_tokens or 0
        self.last_token[name] = now

    def end(self, name: str, answer: list[int]) -> tuple[Conversation, float]:
        """A request has ended; returns its session and the seconds until the next turn."""
        conversation, _ = self.live.pop(name)
        del self.last_token[name]
        return conversation, conversation.answered(answer)
