"""Division of a step's tokens among long prompts and all other requests, in pure functions.

vLLM serves running requests in list order, each with all that is left of the step. So one long prefill takes the whole
step, and every request behind it in the list waits, other long prompts included. Here, before a step is scheduled:

- other requests (decodes, short prompts) get the tokens they want, up to half the step;
- while there are other requests, the long prompts' chunks are bounded in tokens and in attended keys: at depth a dense
  chunk costs more, a star chunk does not;
- a step that prefills short prompts is for these prompts and the decodes alone, but never twice in a row (core.py): a
  short prompt's first token waits for the whole step, and a stream of short prompts must not stop the long ones;
- of what is left, the most urgent long prompt gets half, and the long prompt with the fewest tokens left gets the other
  half. So none starves, and a shorter one need not wait for a longer one to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starling.config.scheduling import MIN_CHUNK, SchedulingOptions
from starling.scheduler.planning.plan import StarPlan, count_pairs

KEYS_PER_TOKEN = 49152


@dataclass(frozen=True)
class Limits:
    """SchedulingOptions as numbers for one engine, in tokens except for ``shared_keys`` (query-key pairs).

    Attributes:
        chunk_unit: chunks are multiples of this, except a prompt's last one.
    """

    step_tokens: int
    long_prompt: int
    shared_tokens: int
    shared_keys: int
    chunk_unit: int = 1

    @property
    def min_chunk(self) -> int:
        """Smallest chunk that is cut off: a smaller one at great depth reads all keys for a few tokens."""
        smallest = max(MIN_CHUNK, min(self.shared_tokens, self.step_tokens // 16))
        return max(smallest, min(self.chunk_unit, self.step_tokens))

    def for_steps(self, count: int) -> Limits:
        """Return the limits of a step that has the shares of ``count`` steps."""
        tokens = min(self.shared_tokens * count, self.step_tokens)
        return replace(self, shared_tokens=tokens, shared_keys=self.shared_keys * count)


@dataclass(frozen=True)
class LongPrompt:
    """A long prompt with ``left`` tokens to prefill, from position ``start`` on.

    Attributes:
        runs: whether the prompt runs; otherwise it waits.
        priority: prompts with a lower number are served first.
    """

    name: str
    start: int
    left: int
    runs: bool = True
    plan: StarPlan | None = None
    priority: int = 0


def make_limits(options: SchedulingOptions, step_tokens: int, chunk_unit: int = 1) -> Limits:
    shared = min(options.shared_step_tokens or max(step_tokens // 4, 1), step_tokens)
    return Limits(
        step_tokens=step_tokens,
        long_prompt=options.long_prompt_tokens or step_tokens,
        shared_tokens=shared,
        shared_keys=options.shared_step_keys or shared * KEYS_PER_TOKEN,
        chunk_unit=chunk_unit,
    )


def divide_step(prompts: Sequence[LongPrompt], others: int, limits: Limits) -> dict[str, int]:
    """Return the tokens that each long prompt may prefill in a step; a prompt that is not named may prefill none.

    Args:
        prompts: the long prompts, most urgent first.
        others: tokens that all other requests would take.
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
    if running is not head:
        # The head may not be admitted in this step. The running prompt keeps a chunk, since it has to end for the head.
        turns.insert(0, (running, min(tokens, limits.min_chunk), keys))
    granted: dict[str, int] = {}
    for prompt, max_tokens, max_keys in turns:
        before = granted.get(prompt.name, 0)
        wanted = min(prompt.left - before, max_tokens, tokens)
        start = prompt.start + before
        chunk = chunk_within(prompt.plan, start, wanted, min(max_keys, keys))
        if not granted:
            chunk = max(chunk, min(wanted, limits.min_chunk))
        elif before + chunk < min(prompt.left, limits.min_chunk):
            continue
        if chunk:
            granted[prompt.name] = before + chunk
            tokens -= chunk
            keys = max(0, keys - attended(prompt.plan, start, start + chunk))
    return granted


def pieces(plan: StarPlan | None, start: int, end: int) -> list[tuple[int, int]]:
    """Cut a chunk at block borders, and return (tokens, keys that the last of them sees) of each piece."""
    if plan is None:
        return [(end - start, end)]
    return [(stop - first, sum(b - a for a, b in keys)) for first, stop, keys in plan.split(start, end)]


def attended(plan: StarPlan | None, start: int, end: int) -> int:
    """Count the query-key pairs of the tokens ``[start, end)``."""
    return sum(count_pairs(tokens, ((0, keys),)) for tokens, keys in pieces(plan, start, end))


def chunk_within(plan: StarPlan | None, start: int, tokens: int, keys: float) -> int:
    """Return the most tokens from ``start`` on, up to ``tokens``, with no more than ``keys`` query-key pairs."""
    if keys == math.inf or tokens <= 0:
        return max(tokens, 0)
    taken = 0
    for count, seen in pieces(plan, start, start + tokens):
        first = seen - count + 1  # keys of the piece's first token; each later token sees one more
        pairs = count_pairs(count, ((0, seen),))
        if pairs > keys:
            twice = 2 * first - 1
            return taken + int((math.sqrt(twice * twice + 8 * keys) - twice) / 2)
        taken, keys = taken + count, keys - pairs
    return taken
