"""Heads that see everything while the others see star blocks, where requests arrive."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from starling.features.dense_heads.model_heads import scores_of
from starling.features.dense_heads.rules import heads_refusals
from starling.features.front_part import FrontPart


class DenseHeads(FrontPart):
    def facts(self) -> Mapping[str, Any]:
        return {
            "find_heads": functools.cache(lambda: scores_of(self.vllm_config)),
            "find_heads_refusals": functools.cache(lambda: tuple(heads_refusals(self.vllm_config))),
        }


PARTS = (DenseHeads.make,)
