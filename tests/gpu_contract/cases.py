"""Mixed batches of dense and star requests, laid out in paged caches as vLLM's workers do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from hypothesis import assume
from hypothesis import strategies as st

from starling.attention_backends.kernels.contract import Rotation
from starling.attention_backends.kernels.reference import masked_attention
from starling.attention_backends.star.rows import VirtualRows, split_rows
from starling.lab.selftest.masks import head_masks, star_mask
from starling.scheduler.planning.plan import DenseHeads, StarPlan

HEAD_SIZE = 32
SCALE = 1 / math.sqrt(HEAD_SIZE)
FREQUENCIES = 10000.0 ** -(torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE)
ANGLES = torch.outer(torch.arange(1024, dtype=torch.float64), FREQUENCIES)
ROTATION = Rotation(ANGLES.cos().float(), ANGLES.sin().float(), True)
FP8 = torch.float8_e4m3fn
# Manager page and kernel page. vLLM splits the manager's pages for kernels that take only smaller ones.
PAGES = ((16, 16), (32, 32), (64, 64), (64, 16))
LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC")
Q_SCALE, K_SCALE, V_SCALE = 0.5, 0.25, 2.0


@dataclass(frozen=True)
class Request:
    """Query positions ``[start, end)`` of one request; without a plan its attention is dense."""

    start: int
    end: int
    plan: StarPlan | None = None


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        requests: of the step, in the batch's order.
        manager_page, kernel_page: tokens of a page of the KV cache manager and of the kernel.
        layout: name of vLLM's KVCacheLayout.
        kv_heads, group: KV heads, and query heads for each of them.
        window: of a layer with a sliding window beside the full one; None for no such layer.
        sinks: whether the layers have attention sinks.
        fp8: whether the cache is fp8 with scales.
        padding: rows and tokens that a CUDA graph adds.
        runner: the model runner, V1 or V2, whose metadata the batch has.
        ranks: the places of the full layer's KV heads in the order of scores; None: no head has one.
        seed: of the numbers.
    """

    requests: tuple[Request, ...]
    manager_page: int = 16
    kernel_page: int = 16
    layout: str = "LBNHC"
    kv_heads: int = 1
    group: int = 1
    window: int | None = None
    sinks: bool = False
    fp8: bool = False
    padding: int = 0
    runner: str = "V1"
    ranks: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def query_lens(self) -> list[int]:
        return [request.end - request.start for request in self.requests]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    def dense_for(self, plan: StarPlan) -> set[int]:
        """The KV heads of the full layer that see everything in a plan's prompt."""
        count = plan.dense_heads.count if plan.dense_heads else 0
        return {head for head, rank in enumerate(self.ranks or ()) if rank < count}

    @property
    def kinds(self) -> list[tuple[bool, ...]]:
        """For each KV head of the full layer, for which of the plans it is dense."""
        dense = [self.dense_for(request.plan) for request in self.requests if request.plan is not None]
        return [tuple(head in heads for heads in dense) for head in range(self.kv_heads)]

    @property
    def num_runs(self) -> int:
        """Into how many runs the full layer's KV heads fall that see the same keys in all prompts."""
        return len(list(groupby(self.kinds)))


@dataclass
class Numbers:
    """K and V of each request, (end, KV heads, D), queries of the step (tokens, H, D) and (H,) sinks, as stored."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: torch.Tensor
    sinks: torch.Tensor | None
    scales: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0))


def numbers(case: Case, fp8_query: bool) -> Numbers:
    """The numbers of a case, in float32 or fp8; an fp8 number is multiplied by its scale for its value."""
    torch.manual_seed(case.seed)
    dtype = FP8 if case.fp8 else torch.float32
    shape = (case.kv_heads, HEAD_SIZE)
    keys = [torch.randn(request.end, *shape).to(dtype) for request in case.requests]
    values = [torch.randn(request.end, *shape).to(dtype) for request in case.requests]
    queries = torch.randn(case.num_tokens + case.padding, case.heads, HEAD_SIZE)
    sinks = torch.randn(case.heads) if case.sinks else None
    scales = (Q_SCALE if fp8_query else 1.0, K_SCALE, V_SCALE) if case.fp8 else (1.0, 1.0, 1.0)
    return Numbers(keys, values, queries.to(FP8) if fp8_query else queries, sinks, scales)


def expected(case: Case, drawn: Numbers, window: int | None = None) -> torch.Tensor:
    """(tokens, H, D) in float64, with the mask written out. A window's layer is dense within the window."""
    outs, first = [], 0
    for request, key, value in zip(case.requests, drawn.keys, drawn.values, strict=True):
        positions = torch.arange(request.end)
        mask = positions[None] <= positions[:, None]
        if window is not None:
            mask &= positions[None] > positions[:, None] - window
        elif request.plan and request.plan.documents:
            queries = drawn.queries[first : first + request.end - request.start].double()
            outs.append(over_blocks(request.plan, request, queries, key.double(), value.double()))
            first += len(queries)
            continue
        elif request.plan is not None:
            plan = request.plan
            mask = star_mask(
                request.end,
                block_size=plan.block_size,
                anchor_size=plan.anchor_size,
                overlap_size=plan.overlap_size,
                context_end=plan.context_end,
            )
        last = first + request.end - request.start
        q_scale, k_scale, v_scale = drawn.scales
        dense = case.dense_for(request.plan) if request.plan and window is None else set()
        query = drawn.queries[first:last].double() * q_scale
        by_head = [
            masked_attention(
                query[:, head * case.group : (head + 1) * case.group],
                key[:, head : head + 1].double() * k_scale,
                value[:, head : head + 1].double() * v_scale,
                of_head[request.start :],
                SCALE,
            )
            for head, of_head in enumerate(head_masks(mask, case.kv_heads, dense))
        ]
        out, lse = (torch.cat(parts, 1) for parts in zip(*by_head, strict=True))
        if drawn.sinks is not None:
            out = out * torch.sigmoid(lse - drawn.sinks.double())[..., None]
        outs.append(out)
        first = last
    return torch.cat(outs)


def over_blocks(
    plan: StarPlan, request: Request, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """(tokens, H, D): the attention of a chunk of a prompt with documents.

    Queries and keys are those at the positions where they are computed. What a query behind the context sees of a block
    is seen by the query rotated back, here as a product of complex numbers.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    true_start, keys_of_query = 0, []
    for number, (start, stop) in enumerate(plan.documents):
        rotate_by = true_start - (plan.anchor_size if number else 0)
        keys_of_query.append((start, stop, rotate_by if stop else 0))
        true_start += stop - start
    outs = []
    for row, index in enumerate(range(request.start, request.end)):
        if index >= plan.context_end:
            parts = [*keys_of_query, (plan.context_end, index + 1, 0)]
        else:
            number = max(block for block, (start, _) in enumerate(plan.documents) if start <= index)
            parts = [(plan.documents[number][0], index + 1, 0)]
            parts += [(0, plan.anchor_size, 0)] if number else []
        places = torch.cat([torch.arange(start, stop) for start, stop, _ in parts])
        rotate_by = torch.cat([torch.full((stop - start,), rotate_by) for start, stop, rotate_by in parts])
        # Rotating the keys forward is rotating the query back.
        pairs = torch.complex(key[places, :, : HEAD_SIZE // 2], key[places, :, HEAD_SIZE // 2 :])
        angles = torch.outer(rotate_by.double(), FREQUENCIES)[:, None]
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        rerotated = torch.cat((pairs.real, pairs.imag), -1)
        scores = torch.einsum("hd,khd->hk", query[row], rerotated) * SCALE
        outs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[places]))
    return torch.stack(outs)


@st.composite
def block_requests(draw: st.DrawFn, page_size: int, max_tokens: int, max_queries: int) -> Request:
    """A chunk, or a decode, of a prompt with documents."""
    lengths = draw(st.lists(st.integers(1, 3 * page_size), min_size=2, max_size=4))
    head = draw(st.sampled_from([0, *lengths[:1]]))
    blocks, start = [(0, head)] if head else [], -(-head // page_size) * page_size
    for length in lengths[1:] if head else lengths:
        if start + length < max_tokens:
            blocks.append((start, start + length))
            start += -(-length // page_size) * page_size
    assume(len(blocks) > 1)
    queries = draw(st.integers(1, 9))
    plan = StarPlan(
        3 * page_size,
        draw(st.integers(0, head // page_size)) * page_size,
        0,
        start,
        start + queries,
        documents=tuple(blocks),
    )
    end = draw(st.one_of(st.integers(start + 1, start + queries + 2), st.integers(1, start + queries)))
    begin = draw(st.one_of(st.just(end - 1), st.integers(0, end - 1)))
    return Request(max(begin, end - max_queries), end, plan)


@st.composite
def requests(draw: st.DrawFn, page_size: int, max_tokens: int, max_queries: int) -> Request:
    """A decode, a dense chunk, or a chunk of a star prompt whose ends are often at borders or one token beside them."""

    def chunk(start: int, end: int, plan: StarPlan | None = None) -> Request:
        return Request(max(start, end - max_queries), end, plan)

    num_tokens = draw(st.one_of(st.integers(2, max_tokens), st.integers(max_tokens // 2, max_tokens)))
    kind = draw(st.sampled_from(["star", "star", "star", "star", "dense", "decode"]))
    if kind == "decode":
        return Request(num_tokens - 1, num_tokens, None)
    if kind == "dense":
        start = draw(st.integers(0, num_tokens - 1))
        return chunk(start, draw(st.integers(start + 1, num_tokens)))
    num_pages = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = st.integers(0, num_pages).map(lambda count: count * page_size)
    block_size = num_pages * page_size
    context_end = draw(st.one_of(st.integers(1, num_tokens), st.integers(num_tokens // 2, num_tokens)))
    plan = StarPlan(block_size, draw(sizes), draw(sizes), context_end, num_tokens)
    borders = {0, num_tokens, context_end, *range(0, num_tokens, block_size)}
    points = sorted({p for border in borders for p in (border - 1, border, border + 1) if 0 <= p <= num_tokens})
    point = st.one_of(st.sampled_from(points[::-1]), st.integers(0, num_tokens))
    start, end = sorted((draw(point), draw(point)))
    if start == end:
        start, end = (start - 1, end) if end == num_tokens else (start, end + 1)
    return chunk(start, end, plan)


def _with_dense_heads(request: Request, count: int, total: int) -> Request:
    if request.plan is None or count == 0:
        return request
    return replace(request, plan=replace(request.plan, dense_heads=DenseHeads(count, total, "digest")))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    fp8: bool,
    sinks: bool,
    fp8_with_sinks: bool = True,
    decodes_first: bool = False,
    layouts: tuple[str, ...] = LAYOUTS,
    max_tokens: int = 260,
    max_queries: int = 260,
    max_heads: int = 8,
    max_requests: int = 5,
    own_positions: bool = False,
    dense_heads: bool = False,
) -> Case:
    """A step of up to ``max_requests`` requests; ``fp8``, ``sinks`` and ``fp8_with_sinks`` say what may be drawn.

    With ``own_positions``, the blocks of at least one of them are documents. With ``dense_heads``, there
    are prompts with dense heads, each with its own number of them.
    """
    manager_page, kernel_page = draw(st.sampled_from(PAGES))
    # vLLM splits pages only where a layer's pages are next to one another.
    allowed = [name for name in layouts if manager_page == kernel_page or name.startswith("L")]
    batch = draw(st.lists(requests(manager_page, max_tokens, max_queries), min_size=1, max_size=max_requests))
    if own_positions:
        batch[draw(st.integers(0, len(batch) - 1))] = draw(block_requests(manager_page, max_tokens, max_queries))
    if decodes_first:
        batch.sort(key=lambda request: request.end - request.start > 1)
    has_sinks = sinks and draw(st.booleans())
    numbers_of_heads = (2, 4, 8) if dense_heads else (1, 4, 8)
    kv_heads = draw(st.sampled_from([heads for heads in numbers_of_heads if heads <= max_heads]))
    ranks = None
    if dense_heads:
        order = draw(st.permutations(range(2 * kv_heads)))  # those of another layer are among them
        ranks = tuple(order[:kv_heads])
        counts = draw(st.permutations(range(2 * kv_heads + 1)))
        batch = [_with_dense_heads(request, count, 2 * kv_heads) for request, count in zip(batch, counts, strict=False)]
    return Case(
        tuple(batch),
        manager_page,
        kernel_page,
        draw(st.sampled_from(allowed)),
        kv_heads,
        draw(st.sampled_from([1, 2, 4])),
        None if own_positions else draw(st.sampled_from([None, None, 1, 17, 50])),
        has_sinks,
        fp8 and (fp8_with_sinks or not has_sinks) and draw(st.booleans()),
        draw(st.sampled_from([0, 0, 0, 1, 3])),
        draw(st.sampled_from(["V1", "V2"])),
        ranks,
        draw(st.integers(0, 99)),
    )


def rows_of(case: Case) -> VirtualRows | None:
    """The virtual rows of a case; None: it has no star rows."""
    plans, ends = [request.plan for request in case.requests], [request.end for request in case.requests]
    return split_rows(plans, case.query_lens, ends, case.kernel_page)


def gathers_pages(case: Case) -> bool:
    """Whether a virtual row of the case has other pages than the first ones of its request."""
    rows = rows_of(case)
    return rows is not None and len(rows.gathered) > 0
