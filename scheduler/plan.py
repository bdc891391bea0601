"""The star plan of one prompt: a few numbers, made once, from which everything downstream follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

from scheduler.options import OptionError, StarOptions, flat_name, merge
from scheduler.spread import best_number

PLAN_KEY = "star_plan"
DEFAULT_QUERY_TOKENS = 512

KeyRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of prompt positions, ascending and disjoint; every start is page-aligned."""


@dataclass(frozen=True)
class StarPlan:
    """How one prompt is prefilled (arXiv 2411.17116, section 2); all sizes in tokens.

    Positions below ``context_end`` are the context, cut into star blocks of ``block_size``; all later
    ones, the query and the generated tokens, attend to everything before them. Its blocks are spread over
    up to ``replicas`` engine replicas, which changes nothing of what is computed. With ``shards`` their KV stays
    there, and later positions attend on each of them.
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
    def is_dense(self) -> bool:
        """With one block phase 1 is plain causal attention, and so is everything after it."""
        return self.context_end <= self.block_size

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
        return sum(count_pairs(stop - start, keys) for start, stop, keys in self.split(0, self.num_prompt_tokens))

    def dense_keys(self) -> int:
        """The same for dense causal prefill."""
        return self.num_prompt_tokens * (self.num_prompt_tokens + 1) // 2

    def context_keys_per_token(self) -> float:
        """Keys that a context token attends to, on average."""
        pairs = sum(count_pairs(stop - start, keys) for start, stop, keys in self.split(0, self.context_end))
        return pairs / max(self.context_end, 1)

    def to_wire(self) -> list[int]:
        return list(astuple(self))

    def summary(self) -> dict[str, Any]:
        """What a client is told of its plan."""
        return {
            "star_blocks": self.num_star_blocks,
            "block_size": self.block_size,
            "anchor_size": self.anchor_size,
            "overlap_size": self.overlap_size,
            "context_end": self.context_end,
            "prompt_tokens": self.num_prompt_tokens,
            "replicas": self.replicas,
            "shards": self.shards,
            "keys_attended": self.keys_attended(),
            "dense_keys": self.dense_keys(),
            "keys_per_context_token": round(self.context_keys_per_token(), 1),
        }


@dataclass(frozen=True)
class Fleet:
    """The replicas that one prompt may be spread over.

    Attributes:
        size: data-parallel replicas of the server.
        reason: why blocks can't be spread over them; None where they can.
        no_shards: why the KV of such blocks can't be attended to where it is; None where it can.
    """

    size: int = 1
    reason: str | None = None
    no_shards: str | None = None


ONE_ENGINE = Fleet()


def count_pairs(num_queries: int, keys: KeyRanges) -> int:
    """Query-key pairs of a causal piece of ``num_queries`` tokens whose last one sees all ``keys``."""
    length = sum(stop - start for start, stop in keys)
    return num_queries * length - num_queries * (num_queries - 1) // 2


def plan_of(extra_args: Mapping[str, Any] | None) -> StarPlan | None:
    """The plan that was resolved into a request's ``extra_args``; None where it runs dense."""
    wire = (extra_args or {}).get(PLAN_KEY)
    if wire is None:
        return None
    plan = StarPlan(*wire)
    return None if plan.is_dense else plan


def request_plan(request: Any) -> StarPlan | None:
    """The plan in an engine request's sampling parameters; None: dense, or a pooling request."""
    params = request.sampling_params
    return plan_of(params.extra_args) if params is not None and params.extra_args else None


def make_plan(
    num_prompt_tokens: int,
    defaults: StarOptions,
    request: StarOptions | None,
    page: int,
    fleet: Fleet = ONE_ENGINE,
) -> StarPlan | None:
    """Resolve options to numbers for one prompt; None: dense.

    Args:
        num_prompt_tokens: length of the prompt.
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        page: tokens of a KV page of the full-attention layers.
        fleet: the replicas there are.

    Raises:
        OptionError: an option does not fit the page, the block, the prompt or the replicas.
    """
    defaults = fit_default(defaults, page)
    options = defaults if request is None else merge(defaults, request)
    given: set[str] = set() if request is None else request.model_fields_set
    if options.mode == "off":
        for field in sorted(given - {"mode"}) if "mode" not in given else ():
            reason = f"{flat_name('mode')} is off on this server, so it would have no effect"
            raise OptionError(flat_name(field), getattr(options, field), reason, "with star=on or star=auto")
        return None
    block_size = find_block_size(options, num_prompt_tokens, page)
    anchor_size = _bounded("anchor_size", options.anchor_size, given, block_size, page)
    overlap_size = _bounded("overlap_size", options.overlap_size, given, block_size, page)
    context_end = find_context_end(options, given, num_prompt_tokens)
    most = most_replicas(options, overlap_size, fleet)
    if "shards" in given:
        check_shards(options, overlap_size, fleet)
    if options.mode == "auto" and num_prompt_tokens < options.min_tokens:
        return None
    plan = StarPlan(block_size, anchor_size, overlap_size, context_end, num_prompt_tokens)
    if most == 1 or plan.is_dense:
        return plan
    replicas = best_number(plan.num_star_blocks, anchor_size / block_size, most)
    return replace(plan, replicas=replicas, shards=replicas > 1 and options.shards == "on")


def most_replicas(options: StarOptions, overlap_size: int, fleet: Fleet) -> int:
    """Over how many replicas blocks may be spread (raises OptionError)."""
    if options.replicas == "auto":
        return 1 if fleet.reason or overlap_size else fleet.size
    if options.replicas == 1:
        return 1

    def refused(reason: str, allowed: str) -> OptionError:
        return OptionError(flat_name("replicas"), options.replicas, reason, allowed)

    if options.replicas > fleet.size:
        many = f"this server has {fleet.size} (--data-parallel-size)"
        raise refused(many, f"auto, or 1 to {fleet.size}" if fleet.size > 1 else "auto or 1")
    if fleet.reason:
        raise refused(fleet.reason, "auto or 1")
    if overlap_size:
        overlap = f"{flat_name('overlap_size')}={overlap_size}"
        raise refused(
            f"with {overlap} each block needs the one before it", f"auto or 1, or {flat_name('overlap_size')}=0"
        )
    return options.replicas


def check_shards(options: StarOptions, overlap_size: int, fleet: Fleet) -> None:
    """Refuse ``shards`` where no prompt could go over several replicas, or not so (raises OptionError)."""
    if options.shards == "off":
        return
    overlap, replicas = flat_name("overlap_size"), flat_name("replicas")
    for refused, reason in (
        (fleet.size == 1, "this server has one replica (--data-parallel-size)"),
        (fleet.reason, fleet.reason),
        (fleet.no_shards, fleet.no_shards),
        (options.replicas == 1, f"{replicas}=1 keeps the prompt on one replica"),
        (overlap_size, f"with {overlap}={overlap_size} each block needs the one before it, on one replica"),
    ):
        if refused:
            raise OptionError(flat_name("shards"), options.shards, str(reason), "off")


def check_sizes(options: StarOptions, page: int) -> None:
    """Refuse server defaults that no prompt could use with this KV page (raises OptionError)."""
    options = fit_default(options, page)
    sizes = {"block_size": options.block_size, "anchor_size": options.anchor_size or 0}
    for field, value in (sizes | {"overlap_size": options.overlap_size}).items():
        _refuse_off_page(field, value, page)
    if options.block_size:
        given = options.model_fields_set
        _bounded("anchor_size", options.anchor_size, given, options.block_size, page)
        _bounded("overlap_size", options.overlap_size, given, options.block_size, page)


def fit_default(options: StarOptions, page: int) -> StarOptions:
    """The options with a block size that nobody gave rounded up to whole pages: 16 P of Attamba need not divide it."""
    if "block_size" in options.model_fields_set:
        return options
    return StarOptions(**options.model_dump(exclude_unset=True) | {"block_size": -(-options.block_size // page) * page})


def find_block_size(options: StarOptions, num_prompt_tokens: int, page: int) -> int:
    """B of a prompt (raises OptionError)."""
    if options.block_size:
        _refuse_off_page("block_size", options.block_size, page)
        return options.block_size
    if not options.num_blocks:
        raise OptionError(
            flat_name("block_size"),
            0,
            f"{flat_name('num_blocks')} is 0 too, so nothing says the size",
            f"{flat_name('block_size')} or {flat_name('num_blocks')} above 0",
        )
    return max(-(-num_prompt_tokens // (options.num_blocks * page)), 1) * page


def _bounded(field: str, value: int | None, given: set[str], block_size: int, page: int) -> int:
    """A or O: within the block. A value the request gave is refused above B, a default becomes B."""
    if value is None:
        return block_size
    _refuse_off_page(field, value, page)
    if value > block_size and field in given:
        raise OptionError(
            flat_name(field),
            value,
            f"it is larger than the star block of {block_size} tokens",
            f"a multiple of {page} from 0 to {block_size}",
        )
    return min(value, block_size)


def find_context_end(options: StarOptions, given: set[str], num_prompt_tokens: int) -> int:
    """Where a prompt's query starts; ``given`` names the options of the request's own (raises OptionError)."""
    for field in ("query_tokens", "context_tokens"):
        value = getattr(options, field)
        if field in given and value is not None and value > num_prompt_tokens:
            raise OptionError(
                flat_name(field),
                value,
                f"the prompt has only {num_prompt_tokens} tokens",
                f"0 to {num_prompt_tokens}",
            )
    if options.context_tokens is not None:
        return min(options.context_tokens, num_prompt_tokens - 1)
    query_tokens = options.query_tokens
    if query_tokens is None or "query_tokens" not in given:
        query_tokens = min(DEFAULT_QUERY_TOKENS if query_tokens is None else query_tokens, num_prompt_tokens // 2)
    return num_prompt_tokens - max(query_tokens, 1)


def _refuse_off_page(field: str, value: int, page: int) -> None:
    if value % page:
        raise OptionError(
            flat_name(field),
            value,
            f"it is not a multiple of the KV page of {page} tokens",
            f"a multiple of {page}",
        )
