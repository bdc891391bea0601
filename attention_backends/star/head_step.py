"""Dense heads in a step: the rows of each kind of heads, and by which calls a layer attends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionImpl, AttentionType, CommonAttentionMetadata

from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.rows import Batch
from starling.scheduler.planning.plan import StarPlan
from starling.vllm_compat.head_attention import (
    build_unsplit,
    builder_of_heads,
    builder_of_other_rows,
    has_scales_by_head,
    impl_of_heads,
)
from starling.vllm_compat.patching import touches


def kinds_of_heads(counts: Sequence[int] | np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(KV heads,) int64, the kind of each head of a layer.

    Args:
        counts: (N,), the numbers of dense heads of the step's plans, ascending.
        ranks: (KV heads,) int64, the places of the layer's heads in the order of scores.
    """
    return np.searchsorted(counts, ranks, side="right")


class HeadRun(NamedTuple):
    """KV heads of a layer, one behind another, that are of one kind: ``[first, stop)``."""

    first: int
    stop: int
    kind: int


def head_runs(counts: Sequence[int], ranks: np.ndarray) -> list[HeadRun] | None:
    """Return a layer's heads in as few runs of one kind as there are, or None if no head of the layer is dense.

    Args:
        counts, ranks: see ``kinds_of_heads``.
    """
    kinds = kinds_of_heads(counts, ranks)
    if (kinds == len(counts)).all():
        return None
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [HeadRun(first, stop, int(kinds[first])) for first, stop in pairwise(borders)]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of all kinds of heads, one kind after the other; R of them, over T query tokens.

    Attributes:
        counts: (N,) int64, the numbers of dense heads of the step's plans, ascending.
        kinds: (R,) int64, which kind of heads a row computes.
        block_table: (R, C) int32.
        query_start_loc: (R + 1,) int32, to (N + 1) T: each kind goes over all tokens.
        seq_lens: (R,) int32.
    """

    counts: np.ndarray
    kinds: np.ndarray
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    def row_heads(self, ranks: np.ndarray) -> torch.Tensor:
        """(R, KV heads) bool, the heads that each row computes in a layer.

        Args:
            ranks: (KV heads,) int64, the places of the layer's heads in the order of scores.
        """
        kinds = kinds_of_heads(self.counts, ranks)
        return async_tensor_h2d(self.kinds[:, None] == kinds[None, :], self.seq_lens.device)


def make_head_rows(counts: Sequence[int], kinds: Sequence[CommonAttentionMetadata]) -> HeadRows:
    """Make the rows of all kinds of heads.

    Args:
        counts: the numbers of dense heads, ascending.
        kinds: the metadata of the step's tokens for each kind of heads.
    """
    tokens = int(kinds[0].query_start_loc_cpu[kinds[0].num_reqs])
    starts = [one.query_start_loc[1 : one.num_reqs + 1] + number * tokens for number, one in enumerate(kinds)]
    return HeadRows(
        np.asarray(counts, dtype=np.int64),
        np.repeat(np.arange(len(kinds)), [one.num_reqs for one in kinds]),
        torch.cat([one.block_table_tensor[: one.num_reqs] for one in kinds]),
        torch.cat([kinds[0].query_start_loc[:1], *starts]),
        torch.cat([one.seq_lens[: one.num_reqs] for one in kinds]),
    )


BuildOfHeads = Callable[[int, int, CommonAttentionMetadata], Any]
"""Makes a backend's metadata for calls on some heads: by the number of kinds of heads behind theirs, their own number
of KV heads, and their rows."""


class HeadCall(NamedTuple):
    """A call on the KV heads ``[first, stop)`` of a layer, with the backend's metadata for it."""

    first: int
    stop: int
    metadata: Any


class HeadStep:
    """The dense heads of one step, some of whose plans have them.

    Args:
        plans: of the step.
        ranks: layer name -> (KV heads,) int64, the places of this rank's heads in the order of scores.
    """

    def __init__(self, plans: Iterable[StarPlan], ranks: Mapping[str, np.ndarray]) -> None:
        self.ranks = ranks
        self.counts = sorted({plan.dense_heads.count for plan in plans if plan.dense_heads})
        self.batch: Batch | None = None
        self.has_unread_heads = False
        self._rows: dict[str, Callable[[], HeadRows]] = {}
        self._calls: dict[str, list[HeadCall]] = {}

    def batch_known(self, batch: Batch) -> None:
        self.batch = batch

    def keep(
        self,
        batch: CommonAttentionMetadata,
        virtual: CommonAttentionMetadata,
        page_size: int,
        layer_names: Sequence[str],
        build: BuildOfHeads | None,
    ) -> None:
        """Note the rows of each kind of heads; comes after ``StarStep.rows`` for the same batch.

        Args:
            batch, virtual: the metadata of the batch's rows, and of those of heads that are dense for no plan.
            layer_names: the layers that have this metadata.
            build: function that makes the metadata of calls on some heads, or None if the layers don't make such calls.
        """
        assert self.batch is not None
        known = self.batch

        def of_kind(count: int) -> CommonAttentionMetadata:
            """Return the metadata of heads that are dense for plans with ``count`` dense heads or more."""
            rows = known.split(
                page_size, lambda plan: None if plan.dense_heads and plan.dense_heads.count >= count else plan
            )
            return batch if rows is None else virtual_metadata(batch, rows)

        kinds = [*map(of_kind, self.counts), virtual]
        ranked = [name for name in layer_names if name in self.ranks]
        runs = {name: runs for name in ranked if (runs := head_runs(self.counts, self.ranks[name]))}
        self.has_unread_heads |= bool(runs)
        self._rows |= dict.fromkeys(runs, functools.cache(lambda: make_head_rows(self.counts, kinds)))
        if build is None:
            return

        @functools.cache
        def built(kind: int, num_kv_heads: int) -> Any:
            return build(len(kinds) - 1 - kind, num_kv_heads, kinds[kind])

        for name, of_layer in runs.items():
            self._calls[name] = [
                HeadCall(run.first, run.stop, built(run.kind, run.stop - run.first)) for run in of_layer
            ]

    def calls(self, layer_name: str) -> list[HeadCall] | None:
        """Return the calls by which a layer attends, one for each run of heads, or None if no head of it is dense."""
        calls = self._calls.get(layer_name)
        if calls is not None:
            self.has_unread_heads = False
        return calls

    def row_heads(self, layer_name: str) -> tuple[HeadRows, torch.Tensor] | None:
        """Return the rows of a layer that attends in one call and each row's heads, or None if no head is dense."""
        if layer_name not in self._rows:
            return None
        self.has_unread_heads = False
        rows = self._rows[layer_name]()
        return rows, rows.row_heads(self.ranks[layer_name])

    def unread(self) -> str | None:
        return "a step with dense heads ran, but no layer took them" if self.has_unread_heads else None


CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""Types of a KV cache in which the part of a head is a slice, as vLLM's options name them."""

CONTIGUOUS_OUTPUT = ("CPU_ATTN", "FLASHINFER")
"""The backends that take the heads of an output to be next to one another, whatever its strides."""


@touches("vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.{alibi_slopes, sliding_window}")
def unsupported_reason(layer: Any) -> str | None:
    """Return the reason why an attention layer's heads can't be computed in several calls, or None if they can."""
    impl, dtype = layer.impl, layer.kv_cache_dtype
    for refused, reason in (
        (layer.attn_type != AttentionType.DECODER, "its attention is not a decoder's"),
        (impl.alibi_slopes is not None, "it has ALiBi slopes"),
        (impl.sliding_window not in (-1, (-1, -1)), "it has a sliding window"),
        (dtype not in CACHE_DTYPES, f"its cache is {dtype}, of which a slice by head is not known"),
        (has_scales_by_head(layer), "its cache has a scale for each head"),
    ):
        if refused:
            return reason
    return None


class HeadBuilders:
    """A backend's metadata builders for calls on some heads of its layers, made when they are first needed.

    One of FlashInfer's takes 8 MiB of the GPU's memory, where it has a plan, and those for each further kind of heads
    share a list of as many pages as the rows of a step may have.

    Args:
        backend: vLLM's name of the backend.
        base: vLLM's class of metadata builders.
        builder: one of it, for all heads of the layers.
    """

    def __init__(self, backend: str, base: Any, builder: Any) -> None:
        self.backend, self.base = backend, base
        self.by_rows = [builder]
        self.by_heads: dict[tuple[int, int], Any] = {}

    def build(self, place: int, num_kv_heads: int, rows: CommonAttentionMetadata) -> Any:
        """Build the backend's metadata for calls on ``num_kv_heads`` KV heads.

        Args:
            place: index of these rows among those of the step; 0: the builder for all heads builds for the same rows.
            rows: the step's tokens in rows.
        """
        while place >= len(self.by_rows):
            self.by_rows.append(builder_of_other_rows(self.backend, self.by_rows[0]))
        key = place, num_kv_heads
        if key not in self.by_heads:
            self.by_heads[key] = builder_of_heads(self.backend, self.by_rows[place], num_kv_heads)
        builder = self.by_heads[key]
        of_rows = functools.partial(self.base.build, builder, 0, rows)
        return build_unsplit(self.backend, builder, rows.num_actual_tokens, of_rows)


def attend_by_heads(
    base: type[AttentionImpl],
    backend: str,
    impl: Any,
    calls: Sequence[HeadCall],
    num_tokens: int,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Write the attention of a layer to ``output`` by a call of vLLM's implementation for each run of its heads.

    Args:
        base: vLLM's class, of which ``impl`` is one.
        backend: vLLM's name of the backend.
        calls: the runs of heads, with the backend's metadata for each.
        num_tokens: of the step; what is behind them in ``output`` is padding.
        kv_cache: (pages, KV heads, page size, 2 * head size).
        layer, query, key, value, output: as those of vLLM's method, as are further arguments.
    """
    group, shape = impl.num_heads // impl.num_kv_heads, (-1, impl.num_heads, impl.head_size)
    whole = query.view(shape), output.view(shape)
    for first, stop, metadata in calls:
        queries, out = (tensor[:, first * group : stop * group] for tensor in whole)
        written = out.new_empty(out.shape) if backend in CONTIGUOUS_OUTPUT and not out.is_contiguous() else out
        part, cache = impl_of_heads(impl, first, stop), kv_cache[:, first:stop]
        base.forward(part, layer, queries, key, value, cache, metadata, written, *args, **kwargs)
        if written is not out:
            out[:num_tokens].copy_(written[:num_tokens])
