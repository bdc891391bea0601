"""The attention of a step's tokens that see documents, as layers compute it on a CPU.

rerotated_rows.py has the rows. On a GPU it is that of range_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels import contract
from starling.attention_backends.kernels.contract import Layout, Operands, Rotation
from starling.attention_backends.kernels.dispatch import RerotatedQueries, paged_attention, rerotated_attention
from starling.attention_backends.kernels.ranges import RangeTable
from starling.attention_backends.star.range_attention import RangeAttention, make_range_attention, make_token_ranges
from starling.attention_backends.star.rerotated_rows import (
    MAX_SHARED,
    MAX_TOKENS,
    RerotatedRows,
    add_rows,
    make_rerotated_rows,
    ranges_as_rows,
)
from starling.attention_backends.star.rows import Batch, VirtualRows


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The step's virtual rows that see such blocks, R of them: what their tokens see beside these blocks.

    Attributes:
        num_tokens: their query tokens, without those that pad a CUDA graph.
        block_table: (R, C) int32.
        query_start_loc: (R + 1,) int32.
        seq_lens: (R,) int32.
    """

    num_tokens: int
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


class StepTokens:
    """The tokens of a step's rows that see documents; the step has others too.

    Args:
        starts, query_lens: (R,) int64, first token of each of these rows in the step, and their number.
        num_tokens: of the step.
    """

    def __init__(self, starts: np.ndarray, query_lens: np.ndarray, num_tokens: int) -> None:
        offsets = np.cumsum(query_lens) - query_lens
        numbers = np.arange(query_lens.sum()) + np.repeat(starts - offsets, query_lens)
        places = np.full(num_tokens, -1)
        places[numbers] = np.arange(len(numbers))
        self.numbers = torch.from_numpy(numbers)
        self.places = torch.from_numpy(np.maximum(places, 0))
        self.are_here = torch.from_numpy(places >= 0)

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write ``part`` (these tokens, ...) to their places in ``whole`` (the step's tokens and padding, ...)."""
        whole = whole[: len(self.places)]
        mask = self.are_here.view(-1, *[1] * (whole.dim() - 1))
        whole.copy_(torch.where(mask, part[self.places].to(whole.dtype), whole))


class RerotatedAttention:
    """The attention of one step over documents.

    Args:
        own: the rows.
        rows: the calls for ``own``; their tokens are indices of those of ``own``.
        tokens: the tokens of ``own``, or None if they are all of the step's.
        decodes: the same as ``own`` and ``rows`` in one call; the layers then share the angles.
    """

    def __init__(
        self,
        own: OwnRows,
        rows: Sequence[RerotatedRows],
        tokens: StepTokens | None,
        decodes: RerotatedRows | None,
    ) -> None:
        self.own = own
        self.rows = rows
        self.tokens = tokens
        self.decodes = decodes
        self._queries: dict[int, RerotatedQueries] = {}

    @property
    def is_whole_step(self) -> bool:
        """Return whether all tokens of the step are in these rows."""
        return self.tokens is None

    def attend(
        self,
        rotation: Rotation,
        query: torch.Tensor,
        out: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        **options: Any,
    ) -> None:
        """Write the attention over all keys to these rows' tokens in ``out``.

        The arguments are those of ``add``, with padding at the end.
        """
        own = self.own
        if self.tokens is None:
            query, written = query[: own.num_tokens], out[: own.num_tokens]
        else:
            query = query[self.tokens.numbers]
            written = out.new_empty((own.num_tokens, *out.shape[1:]))
        if self.decodes is not None:
            operands = self.decodes.operands(query, caches, out=written, layout=layout, **options)
            rerotated_attention(operands, self._queries_of_decodes(self.decodes, rotation))
        else:
            rows = own.block_table, own.query_start_loc, own.seq_lens
            _, lse = paged_attention(Operands(query, *caches, *rows, out=written, layout=layout, **options))
            written.copy_(self._added(rotation, query, written, lse, caches, layout=layout, **options))
        if self.tokens is not None:
            self.tokens.put(written, out)

    def add(
        self,
        rotation: Rotation,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        **options: Any,
    ) -> None:
        """Add the blocks' keys to the attention over all other keys.

        Args:
            rotation: the rotary embedding of the layer.
            query: (tokens, heads, head size) of the step, rotated to the positions of its tokens.
            out: (tokens, heads, value size) of the step, changed in place.
            lse: (tokens, heads) of the step, changed in place.
            caches: the layer's key and value cache, in ``layout``.
            options: further Operands: ``scale``, ``softcap`` and the like.
        """
        if self.tokens is None:
            out.copy_(self._added(rotation, query, out, lse, caches, layout=layout, **options))
            return
        numbers = self.tokens.numbers
        part = lse[numbers]
        wide = self._added(rotation, query[numbers], out[numbers], part, caches, layout=layout, **options)
        self.tokens.put(wide, out)
        self.tokens.put(part, lse)

    def _added(
        self,
        rotation: Rotation,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        **options: Any,
    ) -> torch.Tensor:
        """``out`` with the blocks' keys, in float32, to be rounded once; ``lse`` is changed in place."""
        wide = out.float()
        add_rows(self.rows, rotation, query, caches, wide, lse, **options)
        return wide

    def _queries_of_decodes(self, rows: RerotatedRows, rotation: Rotation) -> RerotatedQueries:
        """Return the re-rotated queries of a step of decodes, one object for all layers, which thus share the angles.

        The angles of all calls of other steps would take 4 R bytes for each query token and document: 260 MB for 512
        tokens, 2,000 documents and R = 64.
        """
        if id(rotation) not in self._queries:
            self._queries[id(rotation)] = RerotatedQueries(rows.tokens, rows.rotate_by, rotation)
        return self._queries[id(rotation)]


def make_rerotated_attention(
    rows: VirtualRows,
    batch: CommonAttentionMetadata,
    virtual: CommonAttentionMetadata,
    page_size: int,
) -> RerotatedAttention:
    """Make the attention of the rows that see documents; there is at least one such row.

    Rows that decode are one call, if the step has no other rows that see documents.

    Args:
        batch, virtual: the metadata of the batch's rows, and of ``rows``, with pages of ``page_size`` tokens.
    """
    assert rows.rerotated is not None
    numbers = np.unique(rows.rerotated.row)
    own, calls, tokens = _rows_of(rows, numbers, batch, virtual, page_size)
    decodes = None
    if (batch.query_start_loc_cpu.diff().numpy()[rows.source[numbers]] == 1).all():
        ranges = make_token_ranges(rows, numbers, page_size)
        if len(ranges.row) <= MAX_SHARED:
            decodes = ranges_as_rows(ranges, batch.block_table_tensor, batch.seq_lens, page_size)
            if len(decodes.tokens) > max(MAX_TOKENS, 2 * len(decodes.seq_lens)):
                decodes = None
    return RerotatedAttention(own, calls, tokens, decodes)


def _rows_of(
    rows: VirtualRows,
    numbers: np.ndarray,
    batch: CommonAttentionMetadata,
    virtual: CommonAttentionMetadata,
    page_size: int,
) -> tuple[OwnRows, list[RerotatedRows], StepTokens | None]:
    """Return the arguments of ``RerotatedAttention`` for the rows ``numbers``, all of which see documents."""
    starts = np.cumsum(rows.query_lens) - rows.query_lens
    query_lens, num_tokens = rows.query_lens[numbers], int(rows.query_lens.sum())
    own_tokens = int(query_lens.sum())
    assert rows.rerotated is not None
    rerotated = replace(rows.rerotated, row=np.searchsorted(numbers, rows.rerotated.row))
    tokens = None
    if own_tokens == num_tokens:
        own = OwnRows(own_tokens, virtual.block_table_tensor, virtual.query_start_loc, virtual.seq_lens)
    else:
        chosen = torch.from_numpy(numbers)
        locations = torch.from_numpy(np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32))
        own = OwnRows(own_tokens, virtual.block_table_tensor[chosen], locations, virtual.seq_lens[chosen])
        tokens = StepTokens(starts[numbers], query_lens, num_tokens)
    first = np.cumsum(query_lens) - query_lens
    calls = make_rerotated_rows(rerotated, first, query_lens, batch.block_table_tensor, page_size)
    return own, list(calls), tokens


class DocumentStep:
    """The documents of one step."""

    def __init__(self) -> None:
        self.has_unset_positions = False
        self._attention: dict[int, RerotatedAttention | RangeAttention] = {}
        self._shifts: np.ndarray | None = None
        self._shifted: tuple[torch.Tensor, torch.Tensor] | None = None

    def batch_known(self, batch: Batch) -> None:
        """Note by how many positions each token is computed behind its index in the prompt, where any is."""
        shifts, first = np.zeros(sum(batch.query_lens), dtype=np.int64), 0
        for plan, queries, end in zip(batch.plans, batch.query_lens, batch.seq_lens, strict=True):
            if plan is not None and plan.documents:
                shifts[first : first + queries] = plan.shifts(end - queries, end)
                self._shifts = shifts
            first += queries
        self.has_unset_positions = self._shifts is not None

    def keep_ranges(
        self,
        rows: VirtualRows,
        batch: CommonAttentionMetadata,
        page_size: int,
        table: RangeTable | None,
        tile_queries: int,
    ) -> bool:
        """Note the keys of rows that see documents, on a GPU.

        Args:
            batch: the metadata of the batch's rows, with pages of ``page_size`` tokens.
            table: the keys of all rows, in a step of decodes that may replay a CUDA graph.
            tile_queries: tokens of a tile of the kernel for rows of many tokens.

        Returns:
            Whether these keys are all that layers read, so that nobody reads metadata of virtual rows.
        """
        if rows.rerotated is None or not contract.uses_triton(batch.seq_lens.device):
            return False
        if table is not None:
            made = RangeAttention([table])
        else:
            made = make_range_attention(rows, batch, page_size, tile_queries)
        self._attention[page_size] = made
        return made.is_whole_step

    def keep_block_tables(
        self, rows: VirtualRows, batch: CommonAttentionMetadata, virtual: CommonAttentionMetadata, page_size: int
    ) -> None:
        """Note what the rows' own block tables leave out, on a CPU: documents.

        Args:
            batch, virtual: the metadata of the batch's rows, and of ``rows``, with pages of ``page_size`` tokens.
        """
        if rows.rerotated is not None and not contract.uses_triton(batch.seq_lens.device):
            self._attention[page_size] = make_rerotated_attention(rows, batch, virtual, page_size)

    def attention(self, page_size: int) -> Any | None:
        """Return the document attention of layers with this page size, or None if no row sees a document.

        It is a RangeAttention on a GPU, and a RerotatedAttention on a CPU.

        Raises:
            RuntimeError: rows see documents, but nothing is noted for this page size.
        """
        if not self._attention:
            return None
        if page_size not in self._attention:
            raise RuntimeError(f"no rows with pages of {page_size} tokens are made for a layer that has such pages")
        return self._attention[page_size]

    def set_positions(self, positions: torch.Tensor) -> None:
        """Give the tokens of such blocks, and those behind them, the positions of their plan.

        Raises:
            RuntimeError: the positions are not one number a token.
        """
        self.has_unset_positions = False
        if self._shifts is None:
            return
        if positions.dim() != 1:
            raise RuntimeError(f"positions of shape {tuple(positions.shape)} can't be those of a plan")
        part, shifts = positions[: len(self._shifts)], async_tensor_h2d(self._shifts, positions.device, positions.dtype)
        part += shifts
        self._shifted = part, shifts

    def ended(self) -> None:
        """Undo ``set_positions``: the sampler of model runner V2 counts a request's output tokens by its positions."""
        if self._shifted is not None:
            part, shifts = self._shifted
            part -= shifts
            self._shifted = None

    def unread(self) -> str | None:
        if not self.has_unset_positions:
            return None
        return "a step with positions of star blocks' own ran, but the model did not take them"
