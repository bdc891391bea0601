"""Retention where requests arrive: why a server retains no pages, and the option as one of vLLM's hints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starling.attention_backends.star.refusals import Rule, options_of, reasons
from starling.config.parsing import OptionError
from starling.config.star import STAR_RETENTION, parse_options
from starling.scheduler.planning.decide import Decision, check_retention
from starling.scheduler.planning.facts import EngineFacts

RETENTION_RULES = (
    Rule(lambda config: not config.cache_config.enable_prefix_caching, "prefix caching is off"),
    Rule(
        lambda config: not options_of(config).scheduling.retained_share,
        "the server's scheduler option retained_share is 0",
    ),
)


ACTION, VERSION = STAR_RETENTION, "1"
"""Type and version of the action of vLLM's ``kv_hints`` (vllm/v1/kv_hints/protocol.py) that has the option."""


class Retention:
    """Front side of retention.

    Attributes:
        refusals: why the server retains no pages; empty if it does.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.refusals = tuple(reasons(RETENTION_RULES, vllm_config))

    def hinted(self, decision: Decision, request: Any, facts: EngineFacts) -> Decision:
        """Take the retention from the request's ``kv_hints``, unless its option says it; ignore other actions."""
        hints = request.kv_hints
        for action in () if hints is None or decision.retention is not None else hints.actions:
            if action.action_type != ACTION:
                continue
            name = f"kv_hints.{ACTION}"
            if action.action_version != VERSION:
                raise OptionError(name, action.action_version, "there is no such version of the action", VERSION)
            retention = parse_options({"retention": None} | action.payload, flat=False, prefix=f"{name}.").retention
            if action.payload.keys() != {"retention"} or retention is None:
                raise OptionError(name, action.payload, "it must say the retention alone", '{"retention": "high"}')
            check_retention(retention, decision.plan, decision.why, facts)
            return replace(decision, retention=retention)
        return decision


make = Retention
