"""The star plan of one prompt: a few numbers, made once. All later stages follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from starling.scheduler.star.assignment import best_num_replicas
from starling.scheduler.star.options import StarOptions, flat_name, merge
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.sizes import find_anchor_and_overlap, find_block_size, has_default_overlap

DEFAULT_QUERY_TOKENS = 512

KeyRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of prompt positions, ascending and disjoint; every start is page-aligned."""


@dataclass(frozen=True)
class StarPlan:
    """How one prompt is prefilled (arXiv 2411.17116, section 2); all sizes in tokens.

    Positions below ``context_end`` are the context, cut into star blocks of ``block_size``. All later positions, the
    query and the generated tokens, attend to everything before them. The blocks are split over up to ``replicas``
    engine replicas, which does not change what is computed. With ``shards`` the KV of the blocks stays on these
    replicas, and later positions attend on each of them.
    """

    block_size: int
    anchor_size: int
    overlap_size: int
    context_end: int
    num_prompt_tokens: int
    replicas: int = 1
    shards: bool = False

    @property
    def num_star_blocks(self) -> int:
        return -(-self.context_end // self.block_size)

    @property
    def block_sizes(self) -> np.ndarray:
        """(num_star_blocks,) float64: the memory, and about the work, of each block, 1 for ``block_size`` tokens."""
        return np.ones(self.num_star_blocks)

    def block_range(self, first: int, stop: int) -> tuple[int, int]:
        """The positions [start, end) of star blocks ``first`` to ``stop - 1``."""
        return first * self.block_size, min(stop * self.block_size, self.context_end)

    @property
    def is_dense(self) -> bool:
        """Whether phase 1 is plain causal attention: with one block it is, and so is everything after it."""
        return self.context_end <= self.block_size

    @property
    def num_client_tokens(self) -> int:
        """Tokens of the prompt as the front gave it to the engine core."""
        return self.num_prompt_tokens

    def client_index(self, index: int) -> int:
        """How many of these tokens are before a position."""
        return index

    def pad(self, token_ids: list[int]) -> list[int]:
        """The prompt as the engine core computes it."""
        return token_ids

    @property
    def head_end(self) -> int:
        """Where block 0 ends. Before it, KV is that of dense attention."""
        return self.block_size

    def block_start(self, position: int) -> int:
        """Where the star block of a context token starts."""
        return position // self.block_size * self.block_size

    def borders(self, first: int = 0) -> Iterable[int]:
        """Where the star blocks behind block 0 start, those from position ``first`` on."""
        start = max(-(-first // self.block_size), 1) * self.block_size
        return range(start, self.context_end, self.block_size)

    def page_key(self, start: int, end: int) -> str | None:
        """What the KV of the page over positions ``[start, end)`` depends on beside its tokens and the pages before it.

        None: on nothing, as under dense attention.
        """
        if start < self.head_end:
            return None
        key = f"{self.block_size}:{self.anchor_size}:{self.overlap_size}"
        return key if end <= self.context_end else f"{key}:{self.context_end}"

    def place_in_key(self, position: int) -> int | None:
        """Where in the prompt a page is, if its KV depends on it, else None."""
        return position

    def key_ranges(self, star_block: int, end: int) -> KeyRanges:
        """The keys of a context token of ``star_block`` whose position is ``end - 1``."""
        own_start = star_block * self.block_size
        near_start = max(0, own_start - self.overlap_size)
        if near_start <= self.anchor_size:
            return ((0, end),)
        if not self.anchor_size:
            return ((near_start, end),)
        return ((0, self.anchor_size), (near_start, end))

    def split(self, start: int, end: int) -> Iterator[tuple[int, int, KeyRanges]]:
        """Cut the query positions ``[start, end)`` at block borders: (start, end, keys of the last one).

        Within one piece, the token at position p sees the same ranges cut off after p: causal attention
        aligned bottom-right over the concatenated ranges.
        """
        while start < end:
            if start >= self.context_end:
                yield start, end, ((0, end),)
                return
            star_block = start // self.block_size
            stop = min((star_block + 1) * self.block_size, self.context_end, end)
            yield start, stop, self.key_ranges(star_block, stop)
            start = stop

    def blocks_done(self, num_computed_tokens: int) -> int:
        """Star blocks whose context tokens are all computed; the last one may be shorter than B."""
        if num_computed_tokens >= self.context_end:
            return self.num_star_blocks
        return num_computed_tokens // self.block_size

    def keys_attended(self) -> int:
        """Query-key pairs of the whole prompt, per head and layer."""
        return self._context_pairs() + self._pairs(self.context_end, self.num_prompt_tokens)

    def dense_keys(self) -> int:
        """Query-key pairs of the same prompt under dense causal prefill."""
        return self.num_prompt_tokens * (self.num_prompt_tokens + 1) // 2

    def context_keys_per_token(self) -> float:
        """Keys that a context token attends to, on average."""
        return self._context_pairs() / max(self.context_end, 1)

    def _context_pairs(self) -> int:
        """Query-key pairs of the context. All whole blocks have equally many, except for those that see all before."""
        size, num_whole = self.block_size, self.context_end // self.block_size
        first = min((self.anchor_size + self.overlap_size) // size + 1, num_whole)
        ends = self._pairs(0, first * size) + self._pairs(num_whole * size, self.context_end)
        return ends + (num_whole - first) * count_pairs(size, self.key_ranges(first, (first + 1) * size))

    def _pairs(self, start: int, stop: int) -> int:
        return sum(count_pairs(end - begin, keys) for begin, end, keys in self.split(start, stop))

    def to_wire(self) -> list[int]:
        """The plan as msgpack takes it; ``plan_from_wire`` (block_positions.py) makes the plan of it."""
        return list(astuple(self))

    def summary(self) -> dict[str, Any]:
        """The plan as a response shows it to the client."""
        return {
            "star_blocks": self.num_star_blocks,
            "block_size": self.block_size,
            "anchor_size": self.anchor_size,
            "overlap_size": self.overlap_size,
            "context_end": self.context_end,
            "prompt_tokens": self.num_prompt_tokens,
            "replicas": self.replicas,
            "shards": self.shards,
            "positions": "prompt",
            "keys_attended": self.keys_attended(),
            "dense_keys": self.dense_keys(),
            "keys_per_context_token": round(self.context_keys_per_token(), 1),
        }


def describe(plan: StarPlan | None, num_prompt_tokens: int, model: Any = None) -> dict[str, Any]:
    """The plan, or that the prompt runs dense, as a response and the live page show it.

    Args:
        model: the text model's configuration. Where it has ``prompt_keys``, that counts the attended keys.
    """
    dense = {"attention": "dense", "prompt_tokens": num_prompt_tokens}
    shown = dense if plan is None else {"attention": "star"} | plan.summary()
    count_keys = getattr(model, "prompt_keys", None)
    return shown | count_keys(plan, num_prompt_tokens) if count_keys else shown


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas that one prompt may be split over.

    Attributes:
        size: the data-parallel replicas of the server; with peers, how many servers there may be.
        split_refusal: why blocks can't be split over them; None where they can.
        shards_refusal: why the KV of such blocks can't be attended to where it is; None where it can.
        present: with peers, how many servers there are now; None: ``size``.
    """

    size: int = 1
    split_refusal: str | None = None
    shards_refusal: str | None = None
    present: int | None = None


ONE_REPLICA = ReplicaSet()


def count_pairs(num_queries: int, keys: KeyRanges) -> int:
    """Query-key pairs of a causal piece of ``num_queries`` tokens whose last one sees all ``keys``."""
    length = sum(stop - start for start, stop in keys)
    return num_queries * length - num_queries * (num_queries - 1) // 2


def make_plan(
    num_prompt_tokens: int,
    defaults: StarOptions,
    request: StarOptions | None,
    page_size: int,
    replicas: ReplicaSet = ONE_REPLICA,
) -> StarPlan | None:
    """Resolve options to numbers for one prompt.

    Args:
        num_prompt_tokens: length of the prompt.
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        page_size: tokens of a KV page of the full-attention layers.
        replicas: the server's replicas.

    Returns:
        The plan; None: the prompt runs dense. A prompt whose context fits in one star block does so in any mode.

    Raises:
        OptionError: an option does not fit the page, the block, the prompt or the replicas.
    """
    options = merge(defaults, request)
    given: set[str] = set() if request is None else request.model_fields_set
    if options.mode == "off":
        for field in sorted(given - {"mode"}) if "mode" not in given else ():
            reason = f"{flat_name('mode')} is off on this server, so it would have no effect"
            raise OptionError(flat_name(field), getattr(options, field), reason, "with star=on or star=auto")
        return None
    block_size = find_block_size(options, num_prompt_tokens, page_size)
    independent = needs_independent_blocks(options, replicas)
    anchor_size, overlap_size = find_anchor_and_overlap(options, given, block_size, page_size, independent=independent)
    limit = max_replicas(options, overlap_size, replicas)
    if replicas.present is not None:
        limit = min(limit, replicas.present)
    if "shards" in given:
        check_shards(options, overlap_size, replicas)
    if options.mode == "auto" and num_prompt_tokens < options.min_tokens:
        return None
    context_end = find_context_end(options, given, num_prompt_tokens)
    plan = StarPlan(block_size, anchor_size, overlap_size, context_end, num_prompt_tokens)
    if plan.is_dense:
        return None
    if limit == 1:
        return plan
    number = best_num_replicas(plan.num_star_blocks, anchor_size / block_size, limit)
    return replace(plan, replicas=number, shards=number > 1 and options.shards == "on")


def needs_independent_blocks(options: StarOptions, replicas: ReplicaSet) -> bool:
    """Whether blocks that need the block before them would turn off what the options or the server are for.

    Segments are there to be reused behind an edit, and a server has several replicas to split prompts over them. Over
    how many of them a prompt is split (``star_replicas``, peers that come and go) does not change what is computed.
    """
    has_segments = options.segment_token is not None or options.segments is not None
    return has_segments or (replicas.size > 1 and replicas.split_refusal is None)


def default_has_overlap(defaults: StarOptions, replicas: ReplicaSet) -> bool:
    """Whether the blocks of a long prompt depend on one another if its request gives no options."""
    independent = needs_independent_blocks(defaults, replicas)
    return bool(defaults.overlap_size) or has_default_overlap(defaults, independent=independent)


def max_replicas(options: StarOptions, overlap_size: int | None, replicas: ReplicaSet) -> int:
    """Over how many replicas blocks may be split.

    Raises:
        OptionError: the options ask for more replicas than can be used.
    """
    if options.replicas == "auto":
        return 1 if replicas.split_refusal or overlap_size else replicas.size
    if options.replicas == 1:
        return 1

    def refused(reason: str, allowed: str) -> OptionError:
        return OptionError(flat_name("replicas"), options.replicas, reason, allowed)

    if options.replicas > replicas.size:
        reason = f"this server has {replicas.size} (--data-parallel-size, --star-replica-peers)"
        raise refused(reason, f"auto, or 1 to {replicas.size}" if replicas.size > 1 else "auto or 1")
    if replicas.split_refusal:
        raise refused(replicas.split_refusal, "auto or 1")
    if overlap_size:
        overlap = f"{flat_name('overlap_size')}={overlap_size}"
        raise refused(
            f"with {overlap} each block needs the one before it", f"auto or 1, or {flat_name('overlap_size')}=0"
        )
    return options.replicas


def check_shards(options: StarOptions, overlap_size: int | None, replicas: ReplicaSet) -> None:
    """Refuse ``shards`` where no prompt is split over several replicas, or its KV can't stay there.

    Raises:
        OptionError: with the reason.
    """
    if options.shards == "off":
        return
    overlap, number = flat_name("overlap_size"), flat_name("replicas")
    for refused, reason in (
        (replicas.size == 1, "this server has one replica (--data-parallel-size, --star-replica-peers)"),
        (replicas.split_refusal, replicas.split_refusal),
        (replicas.shards_refusal, replicas.shards_refusal),
        (options.replicas == 1, f"{number}=1 keeps the prompt on one replica"),
        (overlap_size, f"with {overlap}={overlap_size} each block needs the one before it, on one replica"),
    ):
        if refused:
            raise OptionError(flat_name("shards"), options.shards, str(reason), "off")


def find_context_end(options: StarOptions, given: set[str], num_prompt_tokens: int) -> int:
    """The position at which a prompt's query starts.

    Args:
        given: the options that the request itself gave.

    Raises:
        OptionError: the request's context or query is longer than its prompt.

    Where the request says where segments start, and not how long the query is, the query is the last segment.
    """
    for field in ("query_tokens", "context_tokens"):
        value = getattr(options, field)
        if field in given and value is not None and value > num_prompt_tokens:
            raise OptionError(
                flat_name(field),
                value,
                f"the prompt has only {num_prompt_tokens} tokens",
                f"0 to {num_prompt_tokens}",
            )
    if isinstance(options.segments, tuple) and not given & {"query_tokens", "context_tokens"}:
        return min(options.segments[-1], num_prompt_tokens - 1)
    if options.context_tokens is not None:
        return min(options.context_tokens, num_prompt_tokens - 1)
    query_tokens = options.query_tokens
    if query_tokens is None or "query_tokens" not in given:
        query_tokens = min(DEFAULT_QUERY_TOKENS if query_tokens is None else query_tokens, num_prompt_tokens // 2)
    return num_prompt_tokens - max(query_tokens, 1)
