"""A rule of what an engine can't run: what it looks at, and the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from starling.config.entry import StarlingConfig, config_of
from starling.vllm_compat.report_to_fronts import engine_reports


class Rule(NamedTuple):
    """
    Attributes:
        applies: vLLM's configuration -> whether it is refused, or by what, a text that the reason shows.
        reason: of the refusal.
    """

    applies: Callable[[Any], Any]
    reason: str


def reasons(rules: Iterable[Rule], vllm_config: Any) -> Iterator[str]:
    """Those of the rules that apply, which are looked at one by one; none where nothing is refused."""
    for rule in rules:
        found = rule.applies(vllm_config)
        if found:
            yield f"{rule.reason} ({found})" if isinstance(found, str) else rule.reason


def options_of(config: Any) -> StarlingConfig:
    """Starling's options of a server; the defaults where it has none."""
    return config_of(config) or StarlingConfig()


def reported(field: str) -> Callable[[Any], str | None]:
    """What engine cores that have started report of themselves; see engine_report.py."""

    def found(config: Any) -> str | None:
        reported = {reason for report in engine_reports(config) if (reason := report.get(field))}
        return "; ".join(sorted(reported)) or None

    return found
