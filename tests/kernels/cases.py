"""Random calls of the contract: rows of any lengths, in scattered pages of either layout, with NaN everywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from starling.attention_backends.kernels.contract import Layout, Operands

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Lengths and sizes of a call; ``seed`` draws the numbers in its tensors."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    kv_heads: int = 2
    group: int = 1
    key_size: int = 32
    value_size: int = 32
    page_size: int = 16
    layout: Layout = Layout.CPU
    causal: bool = True
    queries_per_key: int = 1
    window: int | None = None
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    seed: int = 0
    spread: float = 1.0  # of the scores

    def arguments(self) -> dict[str, Any]:
        """The operands that are no tensors."""
        return {
            "scale": self.spread / math.sqrt(self.key_size),
            "causal": self.causal,
            "queries_per_key": self.queries_per_key,
            "window": self.window,
            "softcap": self.softcap,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "layout": self.layout,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors. Slots without a key hold NaN, and columns past a row's keys hold the page id 2^30."""
        torch.manual_seed(self.seed)
        cache_dtype = self.cache_dtype or self.dtype
        counts = [-(-length // self.page_size) for length in self.seq_lens]
        page_ids = torch.randperm(sum(counts) + 2)
        shape = (len(page_ids), self.page_size, self.kv_heads)
        table = torch.full((len(counts), max(counts, default=0) + 1), 1 << 30, dtype=torch.int32)
        keys, values = (torch.full((*shape, size), NAN) for size in (self.key_size, self.value_size))
        taken = 0
        for row, (count, length) in enumerate(zip(counts, self.seq_lens, strict=True)):
            own = page_ids[taken : taken + count]
            taken += count
            table[row, :count] = own
            position = torch.arange(length)
            for cache in (keys, values):
                drawn = torch.randn(length, *cache.shape[2:])
                cache[own[position // self.page_size], position % self.page_size] = drawn
        starts = torch.tensor([0, *torch.tensor(self.query_lens, dtype=torch.int64).cumsum(0)], dtype=torch.int32)
        return {
            "query": torch.randn(sum(self.query_lens), self.kv_heads * self.group, self.key_size).to(self.dtype),
            "key_cache": lay_out(keys.to(cache_dtype), self.layout, transposed=True),
            "value_cache": lay_out(values.to(cache_dtype), self.layout, transposed=False),
            "block_table": table,
            "query_start_loc": starts,
            "seq_lens": torch.tensor(self.seq_lens, dtype=torch.int32),
        }

    def operands(self, **changes: Any) -> Operands:
        return Operands(**(self.tensors() | self.arguments() | changes))

    def run(self, implementation: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of an implementation; out is NaN before, which shows cells that are not written."""
        tensors = self.tensors() | changes
        query = tensors["query"]
        out = query.new_full((*query.shape[:2], self.value_size), NAN)
        result = implementation(self.operands(**tensors, out=out))
        assert result[0] is out
        return result

    def exact(self, implementation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse in float64 for the same numbers, which are rounded to the case's dtypes first."""
        tensors = self.tensors()
        names = ("query",) if self.cache_dtype else ("query", "key_cache", "value_cache")
        return self.run(implementation, **{name: tensors[name].double() for name in names})


def lay_out(cache: torch.Tensor, layout: Layout, *, transposed: bool) -> torch.Tensor:
    """A cache (pages, page size, KV heads, size) in the shape and memory order that vLLM gives it in a layout."""
    if layout is Layout.PAGES:
        return cache.contiguous()
    heads_first = cache.transpose(1, 2).contiguous()
    return heads_first.mT.contiguous().view(heads_first.shape) if transposed else heads_first


def one_row(queries: int, keys: int, **sizes: Any) -> Case:
    return Case((queries,), (keys,), **sizes)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Up to four rows, some without keys, queries or both; causal rows may have more queries than keys."""
    rows = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=4))
    choices: dict[str, Any] = {
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3, 4, 7, 8]),
        "key_size": st.sampled_from([32, 64, 80]),
        "value_size": st.sampled_from([32, 48, 128]),
        "page_size": st.sampled_from([16, 32, 48]),
        "layout": st.sampled_from(list(Layout)),
        "causal": st.booleans(),
        "queries_per_key": st.sampled_from([1, 1, 2, 5]),
        "window": st.sampled_from([None, None, 1, 5, 33]),
        "softcap": st.sampled_from([0.0, 0.0, 1.5]),
        "seed": st.integers(0, 99),
    }
    drawn = {name: draw(strategy) for name, strategy in choices.items() if name not in fixed}
    return Case(tuple(q for q, _ in rows), tuple(k for _, k in rows), **drawn, **fixed)


def rms(difference: torch.Tensor) -> float:
    return difference.double().square().mean().sqrt().item() if difference.numel() else 0.0
