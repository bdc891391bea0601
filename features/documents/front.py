"""Documents where requests arrive."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from starling.config.parsing import OptionError
from starling.config.star import flat_name
from starling.features.documents.rules import document_refusals
from starling.features.front_part import FrontPart
from starling.scheduler.star.plan import StarPlan


class Documents(FrontPart):
    def facts(self) -> Mapping[str, Any]:
        return {"find_document_refusals": functools.cache(lambda: tuple(document_refusals(self.vllm_config)))}

    def check(self, plan: StarPlan, params: Any) -> None:
        """Refuse parameters that count the client's prompt tokens, where the engine gets padding tokens too."""
        if not plan.documents:
            return
        rows, start = params.prompt_logprob_token_ids, params.routed_experts_prompt_start
        for name, value, given in (
            ("prompt_logprob_token_ids", rows and f"{len(rows)} rows", rows is not None),
            ("routed_experts_prompt_start", start, start > 0),
        ):
            if given:
                reason = "with each document on a KV page the engine's prompt has more tokens"
                raise OptionError(name, value, reason, f"none, or {flat_name('segments')}=off")


PARTS = (Documents.make,)
