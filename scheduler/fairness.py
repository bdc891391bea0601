"""How the long prompts of a step share it, with one another and with everybody else. Pure functions.

vLLM serves running requests in list order, each with all that is left of the step: one long prefill eats the step,
whoever stands behind it waits, and so does every later long prompt. Here, before a step is made:

- others (decodes, short prompts) get the tokens they want, up to half the step;
- while there are others, the long ones' chunks are bounded in tokens and in attended keys: at depth a dense chunk
  costs more, a star chunk does not;
- a step that prefills short prompts is theirs and the decodes', but never twice running (scheduler/prompt_sharing.py):
  their first token waits for the whole step, and a stream of them must not stop the long ones;
- of what is left, the long prompt that came first (the most urgent) gets half, the one with the least left the other
  half: the first one stops for a step at most, so none starves; a shorter one need not wait for a longer one to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.plan import StarPlan, count_pairs
from scheduler.scheduling_options import LEAST_CHUNK, SchedulingOptions

KEYS_PER_TOKEN = 49152


@dataclass(frozen=True)
class Limits:
    """Numbers that SchedulingOptions come to on an engine; tokens, but for ``shared_keys`` (query-key pairs)."""

    step_tokens: int
    long_prompt: int
    shared_tokens: int
    shared_keys: int

    @property
    def least_chunk(self) -> int:
        """A chunk is not cut below this: small ones at great depth would read all keys for a few tokens."""
        return max(LEAST_CHUNK, min(self.shared_tokens, self.step_tokens // 16))


@dataclass(frozen=True)
class LongPrompt:
    """A long prompt: ``left`` tokens to prefill from position ``start``; whether it runs already or waits.

    A lower ``priority`` is served first.
    """

    name: str
    start: int
    left: int
    runs: bool = True
    plan: StarPlan | None = None
    priority: int = 0


def make_limits(options: SchedulingOptions, step_tokens: int) -> Limits:
    shared = min(options.shared_step_tokens or max(step_tokens // 4, 1), step_tokens)
    return Limits(
        step_tokens=step_tokens,
        long_prompt=options.long_prompt_tokens or step_tokens,
        shared_tokens=shared,
        shared_keys=options.shared_step_keys or shared * KEYS_PER_TOKEN,
    )


def share_step(prompts: Sequence[LongPrompt], others: int, limits: Limits) -> dict[str, int]:
    """Tokens that each long prompt may prefill in a step; a prompt that is not named may prefill none.

    Args:
        prompts: the long prompts, most urgent first.
        others: tokens that everybody else would take, if they could.
    """
    if not prompts:
        return {}
    tokens = limits.step_tokens - min(others, limits.step_tokens // 2)
    keys: float = math.inf
    if others:
        tokens, keys = min(tokens, limits.shared_tokens), limits.shared_keys
    head = prompts[0]
    quick = min((p for p in prompts if p.priority == head.priority), key=lambda p: p.left)
    turns = [(head, tokens, keys)]
    if quick is not head:
        turns = [(head, (tokens + 1) // 2, keys / 2), (quick, tokens, keys)]
    turns += [(prompt, tokens, keys) for prompt in prompts]
    running = next((prompt for prompt in prompts if prompt.runs), head)
    if running is not head:  # the head may yet find no way in, and what stands in its way has to end
        turns.insert(0, (running, min(tokens, limits.least_chunk), keys))
    granted: dict[str, int] = {}
    for prompt, at_most, most_keys in turns:
        had = granted.get(prompt.name, 0)
        wanted = min(prompt.left - had, at_most, tokens)
        start = prompt.start + had
        chunk = chunk_within(prompt.plan, start, wanted, min(most_keys, keys))
        if not granted:
            chunk = max(chunk, min(wanted, limits.least_chunk))
        elif had + chunk < min(prompt.left, limits.least_chunk):
            continue
        if chunk:
            granted[prompt.name] = had + chunk
            tokens -= chunk
            keys = max(0, keys - attended(prompt.plan, start, start + chunk))
    return granted


def pieces(plan: StarPlan | None, start: int, end: int) -> list[tuple[int, int]]:
    """(tokens, keys that the last of them sees) of a chunk, cut at block borders."""
    if plan is None:
        return [(end - start, end)]
    return [(stop - first, sum(b - a for a, b in keys)) for first, stop, keys in plan.split(start, end)]


def attended(plan: StarPlan | None, start: int, end: int) -> int:
    """Query-key pairs of the tokens ``[start, end)``."""
    return sum(count_pairs(tokens, ((0, keys),)) for tokens, keys in pieces(plan, start, end))


def chunk_within(plan: StarPlan | None, start: int, tokens: int, keys: float) -> int:
    """The most tokens from ``start``, up to ``tokens``, that attend to no more than ``keys`` pairs."""
    if keys == math.inf or tokens <= 0:
        return max(tokens, 0)
    taken = 0
    for count, seen in pieces(plan, start, start + tokens):
        first = seen - count + 1  # keys of the piece's first token; each later one sees one more
        pairs = count_pairs(count, ((0, seen),))
        if pairs > keys:
            twice = 2 * first - 1
            return taken + int((math.sqrt(twice * twice + 8 * keys) - twice) / 2)
        taken, keys = taken + count, keys - pairs
    return taken
