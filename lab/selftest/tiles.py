"""Times of the kernel of documents on a card, by the tile of its programs: the default one, and what else fits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from starling.attention_backends.kernels.contract import Rotation, Sizes
from starling.attention_backends.kernels.ranges import RangeTable, TokenRanges, make_range_table
from starling.lab.machine import has_gpu
from starling.lab.selftest.kernels import NO_GPU
from starling.lab.selftest.result import Check, Result, Skip

if TYPE_CHECKING:
    from starling.attention_backends.kernels.triton.launch import Tile

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
        from starling.attention_backends.kernels.triton.attention import PROGRAMS_PER_MULTIPROCESSOR
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
        from starling.attention_backends.kernels.triton.attention import multiprocessors, rows_that_fill
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
