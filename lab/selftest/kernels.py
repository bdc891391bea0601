"""Checks of attention against float64, of the rows of a star step, and times of the kernel of documents by its tile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from starling.attention_backends.kernels import reference
from starling.attention_backends.kernels.contract import CPU_ISAS, DIMENSIONS, Layout, Operands, Rotation, Sizes
from starling.attention_backends.kernels.cpu import fallback
from starling.attention_backends.kernels.cpu import paged_op as cpu
from starling.attention_backends.kernels.cpu.paged_op import built_op
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table
from starling.attention_backends.kernels.reference import masked_attention
from starling.attention_backends.kernels.xformers_probe import gather_facts, unavailable_reason
from starling.attention_backends.star.step import StarStep, open_step
from starling.lab.machine import has_gpu
from starling.lab.selftest.masks import star_mask
from starling.lab.selftest.result import Check, Result, Skip
from starling.scheduler.planning.plan import StarPlan
from starling.vllm_compat.config import cpu_attention_isa

if TYPE_CHECKING:
    from starling.attention_backends.kernels.triton.launch import Tile


PAGE_SIZE, KV_HEADS, GROUP, SIZE = 32, 2, 2, 64
Rows = tuple[tuple[int, ...], tuple[int, ...]]
"""The query tokens and the keys of each row."""
# Extend, decode, no keys, a whole prompt, no queries, and more queries than keys, so that the first see no key.
MIXED: Rows = ((5, 1, 2, 133, 0, 4), (370, 900, 0, 133, 9, 3))
DECODE: Rows = ((1, 1, 1, 3), (1, 900, 0, 531))

Attention = Callable[[Operands], tuple[torch.Tensor, torch.Tensor]]
RATIO, LSE = 1.1, 1e-5  # the bounds of tests/kernels
LARGE = 1 << 31  # elements; an int32 offset ends here
NO_GPU = "no GPU: the kernel is compiled for one"


def make_operands(rows: Rows, dtype: torch.dtype) -> Operands:
    """Make rows in scattered pages of layout PAGES, on the CPU, with a fixed seed. Memory without a key holds NaN."""
    query_lens, seq_lens = rows
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // PAGE_SIZE) for length in seq_lens]
    page_ids = torch.randperm(sum(counts) + 1, generator=generator)
    shape = (len(page_ids), PAGE_SIZE, KV_HEADS, SIZE)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    table = torch.full((len(counts), max(counts) + 1), int(page_ids[-1]), dtype=torch.int32)
    for row, (count, length) in enumerate(zip(counts, seq_lens, strict=True)):
        own = page_ids[sum(counts[:row]) : sum(counts[: row + 1])]
        table[row, :count] = own
        position = torch.arange(length)
        for cache in (keys, values):
            drawn = torch.randn(length, KV_HEADS, SIZE, generator=generator)
            cache[own[position // PAGE_SIZE], position % PAGE_SIZE] = drawn.to(dtype)
    query = torch.randn(sum(query_lens), KV_HEADS * GROUP, SIZE, generator=generator).to(dtype)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return Operands(query, keys, values, table, starts, lens, scale=SIZE**-0.5, layout=Layout.PAGES)


@dataclass(frozen=True)
class Errors:
    """The error of an implementation.

    Attributes:
        ratio: RMS error of the output over that of torch's SDPA in the same dtype, plus one ulp of float32.
        lse: largest absolute error of the log-sum-exp; infinite where a query without keys has a finite one.
    """

    ratio: float
    lse: float


def measure(attention: Attention, operands: Operands, device: str) -> Errors:
    """Run ``attention`` on a device, with an output that is NaN before, and compare it with the reference."""
    wide = {name: getattr(operands, name).double() for name in ("query", "key_cache", "value_cache")}
    exact, exact_lse = reference.paged_attention(replace(operands, **wide))
    on_device = {name: getattr(operands, name).to(device) for name in DIMENSIONS}
    given = torch.full(operands.query.shape, float("nan"), dtype=operands.query.dtype, device=device)
    out, lse = attention(replace(operands, **on_device, out=given))
    out, lse = out.double().cpu(), lse.double().cpu()
    visible = exact_lse.isfinite()
    same = torch.equal(lse.isneginf(), ~visible) and not out[~visible].any()
    lse_error = (lse - exact_lse)[visible].abs().max().item() if same else float("inf")
    allowed = rms(sdpa(operands).double() - exact) + torch.finfo(torch.float32).eps * rms(exact)
    return Errors(rms(out - exact) / allowed, lse_error)


def sdpa(operands: Operands) -> torch.Tensor:
    """Compute torch's SDPA on the CPU for the same numbers, in the query's dtype, row by row."""
    out = torch.zeros_like(operands.query)
    for row in range(operands.sizes.rows):
        first, last = operands.query_start_loc[row : row + 2].tolist()
        length = int(operands.seq_lens[row])
        page_ids = operands.block_table[row, : -(-length // PAGE_SIZE)].long()
        mask = reference.visible_mask(last - first, length, causal=True, window=None)
        seeing = slice(last - int(mask.any(1).sum()), last)
        if not mask.any():
            continue
        key, value = (
            cache[page_ids].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (operands.keys, operands.values)
        )
        query = operands.query[seeing].transpose(0, 1)[None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[mask.any(1)], scale=operands.scale, enable_gqa=True
        )
        out[seeing] = attended[0].transpose(0, 1)
    return out


def rms(difference: torch.Tensor) -> float:
    return difference.double().square().mean().sqrt().item()


def kernel_checks() -> list[Check]:
    """Return the checks; those of implementations that can't run here are skipped with the reason."""
    wide, half = (torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16)
    return [
        Check("kernel: CPU op", functools.partial(check_cpu_op, wide)),
        Check("kernel: plain torch", functools.partial(check_kernel, fallback.paged_attention, wide, "cpu")),
        Check("kernel: Triton", functools.partial(check_triton, wide)),
        Check("kernel: xformers", functools.partial(check_xformers, half)),
        Check("kernel: CPU op, cache above 2^31 elements", check_large_cpu),
        Check("kernel: Triton, cache above 2^31 elements", check_large_triton),
    ]


def check_kernel(attention: Attention, dtypes: tuple[torch.dtype, ...], device: str) -> Result:
    """Measure the largest ratio of errors over a mixed and a decode batch in each dtype."""
    return judge_cases(attention, [make_operands(rows, dtype) for rows in (MIXED, DECODE) for dtype in dtypes], device)


def judge_cases(attention: Attention, cases: list[Operands], device: str) -> Result:
    """Compare the ratio with ``RATIO``. The ratio is infinite where a log-sum-exp is wrong."""
    errors = [measure(attention, operands, device) for operands in cases]
    lse, ratio = max(error.lse for error in errors), max(error.ratio for error in errors)
    names = sorted({str(operands.query.dtype).removeprefix("torch.") for operands in cases})
    detail = f"{', '.join(names)}; log-sum-exp within {lse:.1e} (bound {LSE:.0e})"
    return Result(ratio if lse <= LSE else float("inf"), RATIO, "x torch SDPA's error", detail)


def cpu_op_missing() -> Skip | None:
    """Return why there is no CPU op; engines use vLLM's then."""
    return None if cpu.built_op() else Skip("the C++ op can't be built: install g++ 12 or newer, or set CXX")


def check_cpu_op(dtypes: tuple[torch.dtype, ...]) -> Result | Skip:
    return cpu_op_missing() or check_kernel(cpu.paged_attention, dtypes, "cpu")


def check_triton(dtypes: tuple[torch.dtype, ...]) -> Result | Skip:
    if not has_gpu():
        return Skip(NO_GPU)
    from starling.attention_backends.kernels.triton import paged as triton

    return check_kernel(triton.paged_attention, dtypes, "cuda")


def check_xformers(dtypes: tuple[torch.dtype, ...]) -> Result | Skip:
    reason = unavailable_reason(gather_facts())
    if reason is not None:
        return Skip(reason)
    from starling.attention_backends.kernels import xformers_paged as xformers

    return check_kernel(xformers.paged_attention, dtypes, "cuda")


def in_large_cache(attention: Attention) -> Attention:
    """Return ``attention`` on the last pages of caches whose offsets do not fit in 32 bits.

    On a CPU, the system gives the other pages no memory, because nothing writes them.
    """

    def moved(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        num_pages = large_num_pages(operands)
        offset, caches = num_pages - len(operands.keys), []
        for cache in (operands.keys, operands.values):
            caches.append(cache.new_empty(num_pages, *cache.shape[1:]))
            caches[-1][offset:] = cache
        return attention(
            replace(
                operands,
                key_cache=caches[0],
                value_cache=caches[1],
                block_table=operands.block_table + offset,
            )
        )

    return moved


def large_num_pages(operands: Operands) -> int:
    """Return the number of pages of a cache of more than 2^31 elements."""
    return LARGE // operands.keys[0].numel() + len(operands.keys)


def check_large_cpu() -> Result | Skip:
    try:
        return cpu_op_missing() or judge_cases(in_large_cache(cpu.paged_attention), [large_case()], "cpu")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return Skip(f"the system gives no address space for the caches: {error}")


def check_large_triton() -> Result | Skip:
    if not has_gpu():
        return Skip(NO_GPU)
    from starling.attention_backends.kernels.triton import paged as triton

    case = large_case()
    needed = 2 * large_num_pages(case) * case.keys[0].numel() * case.keys.element_size() + (1 << 30)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        return Skip(f"{free / 1e9:.1f} GB of GPU memory are free, {needed / 1e9:.1f} GB are needed")
    try:
        return judge_cases(in_large_cache(triton.paged_attention), [case], "cuda")
    finally:
        torch.cuda.empty_cache()  # for the engines of later checks


def large_case() -> Operands:
    return make_operands(MIXED, torch.bfloat16)


HEADS, BOUND = KV_HEADS * GROUP, 2.0
STAR, GENERATE = "star", "decode"
PLAN = StarPlan(block_size=96, anchor_size=64, overlap_size=32, context_end=570, num_prompt_tokens=600)
# (request, tokens before the step, tokens after it): the star chunk starts and ends within a star block.
BATCH = ((GENERATE, 299, 300), (STAR, 70, 590))
DTYPES = (torch.float32, torch.bfloat16)


def row_checks() -> list[Check]:
    """Return a check for each attention op that CPU engines use."""
    return [
        Check("star rows: CPU_ATTN, vLLM's op", functools.partial(check_rows, False)),
        Check("star rows: CPU_ATTN, Starling's op", functools.partial(check_rows, True)),
    ]


def check_rows(own_op: bool, plan: StarPlan = PLAN) -> Result | Skip:
    """Measure the error of star rows over that of dense rows, both relative to their size, with the same Q, K and V.

    Args:
        own_op: True if Starling's op runs the rows, False if vLLM's does.
        plan: plan of the rows. The mask is that of ``PLAN``.
    """
    if has_gpu():
        return Skip("a GPU's backend is made by an engine: the engine checks compare its star rows with the mask")
    ratios = {}
    for dtype in DTYPES:
        if own_op and (built_op() is None or isa(dtype) not in CPU_ISAS):
            continue  # engines use vLLM's op then
        star, dense = (relative_error(own_op, dtype, given) for given in (plan, None))
        ratios[str(dtype).removeprefix("torch.")] = star / dense
    if not ratios:
        return Skip("Starling's op is not built, or this processor's KV layout is for vLLM's op")
    detail = ", ".join(f"{dtype} {ratio:.2f}" for dtype, ratio in ratios.items())
    return Result(max(ratios.values()), BOUND, "x the dense error", detail)


@functools.cache
def engine_config(dtype: torch.dtype) -> Any:
    """Return as much of an engine's configuration as the backend reads."""
    from vllm.config import VllmConfig

    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(
        dtype=dtype, get_head_size=lambda: SIZE, get_num_attention_heads=lambda parallel: HEADS
    )
    config.cache_config.block_size = PAGE_SIZE
    return config


def isa(dtype: torch.dtype) -> str:
    """Return the instruction set that vLLM lays out the pages for."""
    return cpu_attention_isa(engine_config(dtype))


def relative_error(own_op: bool, dtype: torch.dtype, plan: StarPlan | None) -> float:
    """Return RMS error over RMS of the attention that the wrapped backend computes for ``BATCH``.

    Args:
        plan: plan of the star row, which is compared with the mask of ``PLAN``, or None to run it dense, against the
            causal mask.
    """
    generator = torch.Generator().manual_seed(0)
    keys = {name: torch.randn(2, end, KV_HEADS, SIZE, generator=generator).to(dtype) for name, _, end in BATCH}
    num_tokens = sum(end - start for _, start, end in BATCH)
    query = torch.randn(num_tokens, HEADS, SIZE, generator=generator).to(dtype)
    out = attend(own_op, query, keys, plan)
    exact, first = [], 0
    for name, start, end in BATCH:
        mask = torch.ones(end, end, dtype=torch.bool).tril()
        if name == STAR and plan is not None:
            sizes = {"block_size": PLAN.block_size, "anchor_size": PLAN.anchor_size}
            mask = star_mask(end, **sizes, overlap_size=PLAN.overlap_size, context_end=PLAN.context_end)
        queries = query[first : first + end - start].double()
        key, value = keys[name].double()
        exact.append(masked_attention(queries, key, value, mask[start:], SIZE**-0.5)[0])
        first += end - start
    expected = torch.cat(exact)
    return rms(out.double() - expected) / rms(expected)


def attend(own_op: bool, query: torch.Tensor, keys: dict[str, torch.Tensor], plan: StarPlan | None) -> torch.Tensor:
    """Write K and V of ``BATCH`` to pages, build the metadata of the step, and run the layer (tokens, heads, size)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    builder, impl, layer = make_layer(own_op, query.dtype)
    columns = max(-(-end // PAGE_SIZE) for _, _, end in BATCH)
    table = torch.randperm(len(BATCH) * columns, generator=torch.Generator().manual_seed(1))
    table = table.view(len(BATCH), columns).int()
    cache = torch.zeros(len(BATCH) * columns, KV_HEADS, PAGE_SIZE, 2 * SIZE, dtype=query.dtype)
    for row, (name, _, end) in enumerate(BATCH):
        position = torch.arange(end)
        slots = table[row, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        impl.do_kv_cache_update(layer, *keys[name], cache, slots)
    lens = [end - start for _, start, end in BATCH]
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    seq_lens = torch.tensor([end for _, _, end in BATCH], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(BATCH),
        num_actual_tokens=len(query),
        max_query_len=max(lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(len(query), dtype=torch.int64),
    )
    scheduled = dict(zip((name for name, _, _ in BATCH), lens, strict=True))
    step = plan and StarStep({STAR: plan}, scheduled, lambda: list(scheduled), lambda _: None)
    with open_step(step) if step else nullcontext():
        metadata = builder.build(0, common)
        return impl.forward(layer, query, None, None, cache, metadata, torch.full_like(query, float("nan")))


def make_layer(own_op: bool, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Make builder and implementation of the wrapped CPU_ATTN, and what they read of vLLM's layer."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from starling.attention_backends.star.backend import CPU_ATTN
    from starling.attention_backends.star.cpu_impl import CpuImpl

    class OneOp(CpuImpl):
        def uses_op(self, query: torch.Tensor, layer: Any, metadata: Any) -> bool:
            return own_op

    config = engine_config(dtype)
    spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=dtype)
    with set_current_vllm_config(config, check_compile=False):
        builder = CPU_ATTN.get_builder_cls()(spec, [], config, torch.device("cpu"))
        impl = OneOp(HEADS, SIZE, SIZE**-0.5, KV_HEADS, None, None, "auto")
    layer = SimpleNamespace(layer_name="layer", isa=isa(dtype), _k_scale_float=1.0, _v_scale_float=1.0)
    return builder, impl, layer


KEYS, STAGES, WARPS, PROGRAMS = (16, 32, 64), (2, 5), (4, 8), (2, 4)
SCALE, ROUNDING = 0.1, 1e-2
ONE_TOKEN, QUESTION, TAIL = 1, 64, 4_000
"""Tokens of a row."""


def tile_checks() -> list[Check]:
    """Return the measurements; skipped without a GPU."""
    return [
        Check("kernel: tile of a token behind documents", functools.partial(check_tiles, ONE_TOKEN)),
        Check("kernel: tile of a question behind documents", functools.partial(check_tiles, QUESTION)),
        Check(
            "kernel: tile of a long tail behind documents", functools.partial(check_tiles, TAIL, rows=1, documents=144)
        ),
    ]


def check_tiles(queries: int, **shape: int) -> Result | Skip:
    """Measure whether another tile would be faster on this card, for rows of ``queries`` tokens.

    Args:
        shape: fields of ``Shape``.
    """
    if not has_gpu():
        return Skip(NO_GPU)
    from triton.testing import do_bench

    try:
        call = Call(Shape(**shape), queries, "cuda", torch.bfloat16)
        return time_tiles(call, functools.partial(do_bench, return_mode="median"))
    finally:
        torch.cuda.empty_cache()  # for the engines of later checks


@dataclass(frozen=True)
class Shape:
    """Rows of documents. The defaults are eight requests of 64 documents, in the heads of an 8B model."""

    rows: int = 8
    documents: int = 64
    document_tokens: int = 256
    kv_heads: int = 8
    group: int = 4
    size: int = 128
    page_size: int = 16


@dataclass(frozen=True)
class Choice:
    """A tile, and programs of a multiprocessor."""

    tile: Tile
    programs: int

    def __str__(self) -> str:
        tile = self.tile
        return f"{tile.keys} keys, {tile.stages} stages, {tile.warps} warps, {self.programs} programs"


class Call:
    """A step over documents, each at its own positions, whose pages lie in random order.

    Args:
        queries: the last tokens of each row, which attend.
    """

    def __init__(self, shape: Shape, queries: int, device: str, dtype: torch.dtype) -> None:
        from starling.attention_backends.kernels.triton.ranges import prefill_tile_queries

        torch.manual_seed(0)
        self.shape, length = shape, shape.documents * shape.document_tokens
        pages = length // shape.page_size
        heads = shape.kv_heads * shape.group
        self.query = torch.randn(shape.rows * queries, heads, shape.size, device=device, dtype=dtype)
        # As vLLM has it: the keys and values of a head's page are next to one another.
        cache = shape.rows * pages, shape.kv_heads, shape.page_size, 2 * shape.size
        keys, values = torch.randn(cache, device=device, dtype=dtype).transpose(1, 2).split(shape.size, -1)
        self.caches = keys, values
        angles = torch.outer(torch.arange(length), 1e4 ** -torch.linspace(0, 1, shape.size // 2))
        self.rotation = Rotation(angles.cos().to(device), angles.sin().to(device), is_neox_style=True)
        row, document = np.divmod(np.arange(shape.rows * shape.documents), shape.documents)
        first = document * shape.document_tokens
        rows = np.arange(shape.rows)
        ranges = TokenRanges(rows, np.full_like(rows, queries), row, first, first + shape.document_tokens, first)
        size = shape.size
        self.sizes = Sizes(shape.rows, len(self.query), heads, shape.kv_heads, size, size, shape.page_size)
        tile_queries = 1 if queries == 1 else prefill_tile_queries(self.sizes, self.query.element_size())
        self.table: RangeTable = make_range_table(
            ranges,
            tile_queries,
            torch.randperm(shape.rows * pages).view(shape.rows, pages).int().to(device),
            (torch.arange(shape.rows + 1) * queries).int().to(device),
            torch.full((shape.rows,), length).int().to(device),
        )

    def default(self) -> Choice:
        """Return the choice of engines."""
        from starling.attention_backends.kernels.triton.paged import PROGRAMS_PER_MULTIPROCESSOR
        from starling.attention_backends.kernels.triton.ranges import range_tile

        capability = torch.cuda.get_device_capability() if self.query.is_cuda else None
        tile = range_tile(self.sizes, self.query.element_size(), self.table.tile_queries, capability)
        return Choice(tile, PROGRAMS_PER_MULTIPROCESSOR)

    def choices(self) -> Iterator[Choice]:
        """Yield the default, and others."""
        default = self.default()
        tiles = [
            replace(default.tile, keys=keys, stages=stages, warps=warps)
            for keys in KEYS
            for stages in STAGES
            for warps in WARPS
        ]
        found = [Choice(tile, programs) for tile in tiles for programs in PROGRAMS]
        yield from [default, *(each for each in found if each != default)]

    def run(self, choice: Choice) -> torch.Tensor:
        """Compute the attention of all tokens."""
        from starling.attention_backends.kernels.triton.paged import multiprocessors, rows_that_fill
        from starling.attention_backends.kernels.triton.ranges import attend_ranges

        out = torch.empty_like(self.query)
        programs = rows_that_fill(multiprocessors(self.query.device), self.shape.kv_heads, choice.programs)
        operands = self.query, self.caches, self.table, self.rotation, out
        attend_ranges(*operands, scale=SCALE, programs=programs, tile=choice.tile)
        return out


def time_tiles(call: Call, milliseconds: Callable[[Callable[[], object]], float]) -> Result:
    """Measure how much longer the default takes than the best choice; those that do not fit the card are left out.

    Args:
        milliseconds: function that times a call.

    Raises:
        RuntimeError: a choice has another result.
    """
    from triton.runtime.errors import OutOfResources

    found: dict[Choice, float] = {}
    want = call.run(call.default()).float()
    for choice in call.choices():
        try:
            error = (call.run(choice).float() - want).square().mean() / want.square().mean()
            found[choice] = milliseconds(functools.partial(call.run, choice))
        except OutOfResources:
            continue
        if not error.sqrt() <= ROUNDING:
            raise RuntimeError(f"{choice}: the result is another one, by {error.sqrt():.2g} of its size")
    default, best = call.default(), min(found, key=lambda choice: found[choice])
    detail = f"{default}: {1000 * found[default]:.1f} us; best: {best}: {1000 * found[best]:.1f} us"
    return Result(found[default] / found[best], None, "x the time of the best tile", detail)
