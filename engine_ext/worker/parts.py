"""The parts of Starling's workers, in the order in which they are called. A feature's part is one line here."""

from __future__ import annotations

from starling.engine_ext.worker.adapter import Adapter
from starling.engine_ext.worker.dense_heads import DenseHeads
from starling.engine_ext.worker.documents import Documents
from starling.engine_ext.worker.part import WorkerPart
from starling.engine_ext.worker.split import Split

PARTS: tuple[type[WorkerPart], ...] = (Documents, DenseHeads, Split, Adapter)
