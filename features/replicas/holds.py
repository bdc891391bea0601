"""Numbers of released holds, in memory that others read: were pages still held after they had been read?

A replica holds pages until their reader has them, or has not answered for the seconds of replicas.timeout. A reader
that stands still, as a stopped process, may go on to read pages that other requests have by then. Therefore a
reader's last read, after the pages have arrived, is one word at the replica that says whether they were held.

A replica counts its holds from 1. Word ``hold % WORDS`` is the highest number of a released hold with that remainder.
It is written before a step that may write to the pages is launched. Where two holds share a word, the earlier one
counts as released with the later one: its reader computes pages that it could have read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

WORDS = 4096
WORD_BYTES = 8
UNKNOWN = 2**63 - 1
"""An answer that has not arrived; as the highest number it means that the hold is released."""


class Holds:
    """The released holds of one worker, and the answers that it has read of others.

    Args:
        agent: the worker's NIXL agent.
    """

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.released = torch.zeros(WORDS, dtype=torch.int64)
        self.answers = torch.full((WORDS,), UNKNOWN)
        self._unused = list(range(WORDS))
        regions = [(words.data_ptr(), WORDS * WORD_BYTES, 0, "") for words in (self.released, self.answers)]
        self.registered = agent.register_memory(regions, "DRAM")

    @property
    def address(self) -> int:
        """Return the address at which other workers read the released holds."""
        return self.released.data_ptr()

    def note_released(self, holds: Iterable[int]) -> None:
        """Let readers know that the pages of these holds are no longer held."""
        for hold in holds:
            self.released[hold % WORDS] = max(hold, int(self.released[hold % WORDS]))

    def new_answer(self) -> int:
        """Return an answer that no other read uses; free it when nothing may write to it any more."""
        answer = self._unused.pop()
        self.answers[answer] = UNKNOWN
        return answer

    def free_answer(self, answer: int | None) -> None:
        if answer is not None:
            self._unused.append(answer)

    def descriptors(self, answer: int, address: int, hold: int) -> tuple[Any, Any]:
        """NIXL's lists, local and remote, for the read of an answer from a worker's ``address``."""
        local = (self.answers.data_ptr() + answer * WORD_BYTES, WORD_BYTES, 0)
        remote = (address + hold % WORDS * WORD_BYTES, WORD_BYTES, 0)
        return self.agent.get_xfer_descs([local], "DRAM"), self.agent.get_xfer_descs([remote], "DRAM")

    def was_held(self, answer: int, hold: int) -> bool:
        """Return whether the answer says that the hold was not released."""
        return int(self.answers[answer]) < hold

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)
