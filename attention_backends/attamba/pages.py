"""K and V of a cache's rows where they lie in its pages, in the order that the attention of the device reads fastest.

On a CPU that is kernels/contract.py's layout CPU, keys transposed within a page and head, as vLLM's own backend has it;
elsewhere a row K|V after the other. Either way the 17th row of a page is one K|V.
"""

from __future__ import annotations

import torch

from attention_backends.attamba.chunks import PAGE_ROWS
from attention_backends.kernels.contract import Layout, page_views


class KvPages:
    """Views of one cache's pages.

    Args:
        pages: (pages, 17, 2 x heads x head size).

    Attributes:
        keys, values: as ``layout`` has them, for ``paged_attention``.
    """

    def __init__(self, pages: torch.Tensor, heads: int) -> None:
        width = pages.shape[-1] // 2
        size, start = width // heads, pages.storage_offset()
        self.last_rows = pages[:, PAGE_ROWS]
        if pages.device.type == "cpu":
            self.layout = Layout.CPU
            shape = (len(pages), heads, PAGE_ROWS, size)
            strides = (pages.stride(0), 2 * PAGE_ROWS * size, size, 1)
            self.keys = pages.as_strided(shape, strides, start)
            self.values = pages.as_strided(shape, strides, start + PAGE_ROWS * size)
        else:
            self.layout = Layout.PAGES
            rows = pages[:, :PAGE_ROWS].unflatten(-1, (2, heads, size))
            self.keys, self.values = rows.unbind(2)
        self.key_rows, self.value_rows = page_views(self.keys, self.values, self.layout)

    def write(self, page: torch.Tensor, row: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value (T, heads, head size) in rows ``row`` (T,) of pages ``page`` (T,)."""
        self.key_rows[page, row] = key
        self.value_rows[page, row] = value

    def write_last(self, page: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store them in the 17th rows."""
        self.last_rows[page] = torch.cat([key, value], 1).flatten(1)
