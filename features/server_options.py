"""What a server's options ask for."""

from __future__ import annotations

from typing import Any

from starling.features.rule import options_of
from starling.scheduler.star.request_metadata import LIBRARY_CONNECTORS


def has_library(config: Any) -> bool:
    """Whether pages go to host memory or beyond it, so that others may find them (--star-library)."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector in LIBRARY_CONNECTORS


def has_documents(config: Any) -> bool:
    """Whether the server's options say where documents start, so that its engine is made for them."""
    return options_of(config).star.says_where_documents_start


def has_dense_heads(config: Any) -> bool:
    """Whether the server's options say that some heads see everything, so that its engine is made for them.

    A file of scores says so by itself, unless the server's share is 0.
    """
    options = options_of(config)
    share = options.star.dense_heads
    return options.star_heads is not None if share is None else share > 0
