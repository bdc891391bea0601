"""Attamba models where requests arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.features.front_part import FrontPart
from starling.features.star.rules import is_attamba

NO_OVERLAP = "an Attamba model's window ends at the border of a star block, and an overlap would go beyond it"


class Attamba(FrontPart):
    def facts(self) -> Mapping[str, Any]:
        return {"overlap_refusal": NO_OVERLAP} if is_attamba(self.vllm_config) else {}


PARTS = (Attamba.make,)
