"""Star Attention where requests arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.features.front_part import FrontPart
from starling.features.rule import options_of
from starling.features.star.rules import star_refusals


class Star(FrontPart):
    def facts(self) -> Mapping[str, Any]:
        sizes = options_of(self.vllm_config).quality_sizes
        return {"refusals": tuple(star_refusals(self.vllm_config)), "quality_sizes": sizes}


PARTS = (Star.make,)
