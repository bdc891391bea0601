"""The token ids of the sessions of a trace."""

from __future__ import annotations

import random

from benchmarks.agents.trace import Session, Turn

VOCABULARY = 250


class Conversation:
    """One session while it is played: its tokens so far.

    Args:
        shared: the tokens that all sessions begin with.
    """

    def __init__(self, number: int, session: Session, shared: list[int]) -> None:
        self.number, self.session, self.shared = number, session, shared
        self.random = random.Random(number)
        self.ids: list[int] = list(shared)
        self.next_turn = 0

    @property
    def turn(self) -> Turn | None:
        """Return the next turn, or None if the session has ended."""
        turns = self.session.turns
        return turns[self.next_turn] if self.next_turn < len(turns) else None

    def prompt(self) -> list[int]:
        """Return the prompt of the next turn."""
        turn = self.turn
        assert turn is not None
        if turn.kept < len(self.ids):  # the session was compacted
            self.ids = list(self.shared)
        self.ids += self.random.choices(range(VOCABULARY), k=turn.new)
        return self.ids.copy()

    def answered(self, ids: list[int]) -> float:
        """Take in the answer; returns the seconds until the next turn."""
        turn = self.turn
        assert turn is not None
        self.ids += ids
        self.next_turn += 1
        return turn.think


def conversations(trace: list[Session]) -> list[Conversation]:
    shared = random.Random(-1).choices(range(VOCABULARY), k=trace[0].turns[0].kept)
    return [Conversation(number, session, shared) for number, session in enumerate(trace)]
