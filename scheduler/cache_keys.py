"""What a KV page depends on under star, said in its prefix-cache key.

vLLM chains page hashes over tokens and "extra keys" (LoRA, salt, images). Star adds one more:

- a page of block 0 has the KV of dense attention: no key, so star and dense share it;
- a page of a later block, inside the context, also depends on A, B and O;
- the page that holds ``context_end`` and all after it attend globally over star-built KV: also on
  ``context_end``.

A chat's next turn has a later ``context_end`` and the same blocks, so it hits all complete context pages.
"""

from __future__ import annotations

from scheduler.plan import StarPlan


def star_page_key(plan: StarPlan, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of the page over positions ``[start, end)``, tagged like vLLM's own; None: none."""
    if start < plan.block_size:
        return None
    key = f"star:{plan.block_size}:{plan.anchor_size}:{plan.overlap_size}"
    return ("star", key if end <= plan.context_end else f"{key}:{plan.context_end}")
