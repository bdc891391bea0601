"""The queries of examples/monitoring, and the names of metrics in them and on a server's /metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

MONITORING = Path(__file__).resolve().parents[1] / "examples" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "starling.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = yaml.safe_load((MONITORING / "prometheus" / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = QUERIES + [rule["expr"] for rule in RULES]
OF_COMPRESSED_CACHES = {"starling:cache_states", "starling:cache_bytes_per_token", "starling:cache_capacity_tokens"}
"""Series that a server of an Attamba model has, and no other: tests/parity/test_attamba.py compares their values."""
OF_LIBRARIES = {f"starling:library_{name}_total" for name in ("bad_files", "removed_files", "failed_writes")}
"""Series that a server with a library has: tests/unit/library/test_tier.py holds them."""
NOT_METRICS = {"by", "up"}  # `up` is Prometheus' own


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in a PromQL expression."""
    bare = re.sub(r"\{.*?\}|\[.*?\]|\bby \(.*?\)", " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*(?![\w:]| *\()", bare)) - NOT_METRICS


def labels_of(expression: str) -> set[str]:
    """The labels in a PromQL expression, except a histogram's own."""
    groups = [name for group in re.findall(r"\bby \((.*?)\)", expression) for name in re.split(r", *", group)]
    return {*groups, *re.findall(r"[{,] *(\w+) *[=!]", expression)} - {"le"}


def samples_of(text: str) -> set[str]:
    """The names of the metrics that have a value on /metrics, without the times at which counters were made."""
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    return {name for name in names if not name.endswith("_created")}
