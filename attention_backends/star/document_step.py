"""Documents in a step: the positions of their tokens, and how layers attend to blocks with positions of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from starling.attention_backends.kernels import devices
from starling.attention_backends.kernels.ranges import RangeTable
from starling.attention_backends.star.range_attention import RangeAttention, make_range_attention
from starling.attention_backends.star.rows import Batch, VirtualRows
from starling.attention_backends.star.turned_attention import TurnedAttention, make_turned_attention


class DocumentStep:
    """The documents of one step."""

    def __init__(self) -> None:
        self.has_unset_positions = False
        self._attention: dict[int, TurnedAttention | RangeAttention] = {}
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
        """Note the keys of rows that see blocks with positions of their own, on a GPU.

        Args:
            batch: the metadata of the batch's rows, with pages of ``page_size`` tokens.
            table: the keys of all rows, in a step of decodes that may replay a CUDA graph.
            tile_queries: tokens of a tile of the kernel for rows of many tokens.

        Returns:
            Whether these keys are all that layers read, so that nobody reads metadata of virtual rows.
        """
        if rows.turned is None or not devices.uses_triton(batch.seq_lens.device):
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
        """Note what the rows' own block tables leave out, on a CPU: blocks with positions of their own.

        Args:
            batch, virtual: the metadata of the batch's rows, and of ``rows``, with pages of ``page_size`` tokens.
        """
        if rows.turned is not None and not devices.uses_triton(batch.seq_lens.device):
            self._attention[page_size] = make_turned_attention(rows, batch, virtual, page_size)

    def attention(self, page_size: int) -> Any | None:
        """Return the document attention of layers with this page size, or None if no row sees a document.

        It is a RangeAttention on a GPU, and a TurnedAttention on a CPU.

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
