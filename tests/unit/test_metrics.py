"""Worker counters on the front's /metrics, from a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

from prometheus_client import REGISTRY, generate_latest

from engine_ext import metrics

COUNT_HITS = (
    "from engine_ext.metrics import scheduler_metrics as m; m().count_hit('block', 64); m().count_hit('block', 0)"
)
COUNT = "from engine_ext.metrics import worker_metrics; worker_metrics().context_tokens.inc(7)"
HOLD = """
from engine_ext.metrics import cache_metrics
cache_metrics().states.set(20)
cache_metrics().bytes_per_token.labels("0", "full_attention").set(34)
"""


def test_workers_counters_show_up_and_those_of_a_parents_workers_do_not(monkeypatch, tmp_path):
    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    before = set(REGISTRY._collector_to_names)
    directory = metrics.share_with_workers.__wrapped__()
    try:
        assert os.environ[metrics.DIRECTORY] == directory.name != str(tmp_path)
        for _ in range(2):
            subprocess.run([sys.executable, "-c", COUNT + HOLD], check=True, timeout=60)
        told = generate_latest(REGISTRY).decode()
        assert "starling:cache_states 40.0" in told, "what engines hold adds up"
        assert 'starling:cache_bytes_per_token{group="0",kind="full_attention"} 34.0' in told, "what they are is alike"
        assert "starling:context_tokens_total 14.0" in generate_latest(REGISTRY).decode()
        subprocess.run([sys.executable, "-c", COUNT_HITS], check=True, timeout=60)
        shown = generate_latest(REGISTRY).decode()
        assert 'starling:cached_tokens_total{kind="block"} 64.0' in shown
        assert 'starling:cache_hits_total{kind="block"} 1.0' in shown
        assert 'starling:cache_hits_total{kind="prefix"} 0.0' in shown
        subprocess.run(
            [sys.executable, "-c", COUNT], check=True, timeout=60, env=os.environ | {metrics.DIRECTORY: str(tmp_path)}
        )
        assert "starling:context_tokens_total 14.0" in generate_latest(REGISTRY).decode()
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)
        directory.cleanup()
