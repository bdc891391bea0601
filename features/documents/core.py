"""Documents in the engine core: padding between them, and where their KV came from."""

from __future__ import annotations

from starling.features.documents.padding import BlockPadding
from starling.features.documents.provenance import Provenance

PARTS = (BlockPadding.make, Provenance.make)
