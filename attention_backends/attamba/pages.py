"""Views of K and V in the pages of a cache, in the layout that the attention of the device reads fastest.

On CPU this is the layout CPU of kernels/contract.py, in which keys are transposed within a page and head, as in vLLM's
own backend. On other devices a page holds rows of K|V. In both layouts the 17th row of a page is one K|V.
"""

from __future__ import annotations

import torch

from starling.attention_backends.attamba.chunks import PAGE_ROWS
from starling.attention_backends.kernels.contract import Layout, page_views


class KvPages:
    """Views of the pages of one cache.

    Args:
        pages: (num_pages, 17, 2 x heads x head size).
        heads: of K, and of V.
        layout: of ``keys`` and ``values``; by default that of the pages' device.

    Attributes:
        keys, values: the first 16 rows of each page, for ``paged_attention``.
        key_rows, value_rows: the same memory as (num_pages, 16, heads, head size), to write to.
        last_rows: (num_pages, 2 x heads x head size), the 17th row of each page.
    """

    def __init__(self, pages: torch.Tensor, heads: int, layout: Layout | None = None) -> None:
        width = pages.shape[-1] // 2
        size, start = width // heads, pages.storage_offset()
        self.last_rows = pages[:, PAGE_ROWS]
        self.layout = layout or (Layout.CPU if pages.device.type == "cpu" else Layout.PAGES)
        if self.layout is Layout.CPU:
            shape = (len(pages), heads, PAGE_ROWS, size)
            strides = (pages.stride(0), 2 * PAGE_ROWS * size, size, 1)
            self.keys = pages.as_strided(shape, strides, start)
            self.values = pages.as_strided(shape, strides, start + PAGE_ROWS * size)
        else:
            rows = pages[:, :PAGE_ROWS].unflatten(-1, (2, heads, size))
            self.keys, self.values = rows.unbind(2)
        self.key_rows, self.value_rows = page_views(self.keys, self.values, self.layout)

    def write(self, page_ids: torch.Tensor, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value (T, heads, head size) at rows ``rows`` (T,) of the pages ``page_ids`` (T,)."""
        self.key_rows[page_ids, rows] = key
        self.value_rows[page_ids, rows] = value

    def write_last(self, page_ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value (T, heads, head size) in the 17th rows of the pages ``page_ids`` (T,)."""
        self.last_rows[page_ids] = torch.cat([key, value], 1).flatten(1)


def locate(
    table: torch.Tensor, request: torch.Tensor, row: torch.Tensor, page_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page ids, and rows within these pages, of the rows ``row`` of requests, which are broadcast.

    Args:
        table: (R, columns) int32, the block table.
        page_rows: rows of a page.
    """
    return table[request, row // page_rows].long(), row % page_rows
