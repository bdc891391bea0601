"""The fields of what an engine core reports to its fronts when it has started (engine_ext/engine_report.py)."""

from __future__ import annotations

STAR, SPLIT, BLOCK_POSITIONS, HEADS, HEADS_ORDER = "star", "split", "block_positions", "heads", "heads_order"
"""Why no prompt can run star, be split over replicas, have blocks with positions of their own, or heads that see
everything; None: it can. The last one is the order of the heads' scores that the workers have."""
