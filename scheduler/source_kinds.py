"""The kinds of places from which the KV of a document's tokens may have come."""

from __future__ import annotations

MEMORY, PEER, COMPUTED = "memory", "peer", "computed"
KINDS = (MEMORY, "host", "storage", PEER, COMPUTED)
"""The engine's own memory; host memory; files or an object store; another replica; nowhere before."""
