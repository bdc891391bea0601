"""Counters of engine cores and workers on the API server's /metrics; each is a process of its own."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from starling.vllm_compat.metrics import DIRECTORY_ENV, MULTIPROCESS_ENV, DirectoryCollector, collect_from_children

COUNT_HITS = (
    "from starling.scheduler.provenance import scheduler_metrics as m; "
    "m().count_hit('block', 64); m().count_hit('block', 0)"
)
COUNT_TOKENS = (
    "from starling.engine_ext.worker.star_worker import worker_metrics; worker_metrics().context_tokens.inc(7)"
)
SET_SIZES = """
from starling.scheduler.provenance import cache_metrics
cache_metrics().states.set(20)
cache_metrics().bytes_per_token.labels("0", "full_attention").set(34)
"""


def run(code: str, **environment: str) -> None:
    """Run a child process that the API server has started."""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ | environment)


def shown() -> str:
    return generate_latest(REGISTRY).decode()


def test_metrics_of_children_are_shown_and_those_of_a_parents_children_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv(DIRECTORY_ENV, str(tmp_path))
    monkeypatch.delenv(MULTIPROCESS_ENV, raising=False)
    before = set(REGISTRY._collector_to_names)
    directory = collect_from_children.__wrapped__()
    try:
        assert os.environ[DIRECTORY_ENV] == directory.name != str(tmp_path)
        for _ in range(2):
            run(COUNT_TOKENS + SET_SIZES)
        metrics = shown()
        assert "starling:cache_states 40.0" in metrics, "the states of several engines are added up"
        assert 'starling:cache_bytes_per_token{group="0",kind="full_attention"} 34.0' in metrics, "sizes are equal"
        assert "starling:context_tokens_total 14.0" in metrics
        run(COUNT_HITS)
        metrics = shown()
        assert 'starling:cached_tokens_total{kind="block"} 64.0' in metrics
        assert 'starling:cache_hits_total{kind="block"} 1.0' in metrics
        assert 'starling:cache_hits_total{kind="prefix"} 0.0' in metrics
        run(COUNT_TOKENS, **{DIRECTORY_ENV: str(tmp_path)})
        assert "starling:context_tokens_total 14.0" in shown()
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)
        directory.cleanup()


FORKED_REPLICAS = f"""
import multiprocessing, os, sys
import prometheus_client  # by the launcher, before vLLM asks for multiprocess mode

os.environ["{MULTIPROCESS_ENV}"] = sys.argv[1]
fork = multiprocessing.get_context("fork")


def count():
    from starling.engine_ext.worker.star_worker import worker_metrics
    from starling.features.replicas.page_transfer import replica_metrics

    worker_metrics().context_tokens.inc(7)
    replica_metrics().bytes_moved.inc(3)


def run(*functions):
    for function in functions[:1]:
        process = fork.Process(target=run, args=functions[1:])
        function()
        process.start()
        process.join()
        assert process.exitcode == 0


for _ in range(2):  # a replica's engine core, which forks its worker
    process = fork.Process(target=run, args=(count, count))
    process.start()
    process.join()
    assert process.exitcode == 0
"""


def test_replicas_that_are_forked_beside_several_api_servers_are_on_their_metrics(tmp_path, monkeypatch):
    """vLLM spawns the API servers, and sets the directory of their metrics after Starling's imports."""
    monkeypatch.delenv(MULTIPROCESS_ENV, raising=False)
    monkeypatch.delenv(DIRECTORY_ENV, raising=False)
    subprocess.run([sys.executable, "-c", FORKED_REPLICAS, str(tmp_path)], check=True, timeout=300)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    metrics = generate_latest(registry).decode()
    assert "starling:context_tokens_total 28.0" in metrics
    assert "starling:bytes_moved_total 12.0" in metrics


FULL_TEMP_DIRECTORY = f"""
import logging, os, subprocess
logging.basicConfig(format="%(message)s")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", os.environ["{DIRECTORY_ENV}"]], check=True)
with open(os.environ["{DIRECTORY_ENV}"] + "/filler", "wb") as filler:
    filler.write(bytes(60 * 1024))
{COUNT_TOKENS}
{SET_SIZES}
{COUNT_HITS}
print(os.listdir(os.environ["{DIRECTORY_ENV}"]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_process_runs_without_its_metrics_where_the_temp_directory_is_full(tmp_path, monkeypatch):
    monkeypatch.delenv(MULTIPROCESS_ENV, raising=False)
    environment = os.environ | {DIRECTORY_ENV: str(tmp_path)}
    command = ["unshare", "--mount", sys.executable, "-c", FULL_TEMP_DIRECTORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout == "['filler']\n"
    (line,) = [line for line in done.stderr.splitlines() if "/metrics" in line]
    assert re.fullmatch(r"Metrics of process \d+ are missing on /metrics: .*No space left.*set TMPDIR.*", line)


def test_a_server_starts_where_no_temp_directory_can_be_made(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv(MULTIPROCESS_ENV, raising=False)
    monkeypatch.setenv(DIRECTORY_ENV, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(logging.getLogger("vllm.starling"), "propagate", True)
    assert collect_from_children.__wrapped__() is None
    assert DIRECTORY_ENV not in os.environ
    assert "missing on /metrics" in caplog.text


def test_the_front_shows_its_own_metrics_where_the_directory_of_the_others_is_gone(monkeypatch, tmp_path, caplog):
    """As where a system clears old files from /tmp."""
    registry, directory = CollectorRegistry(), tmp_path / "metrics"
    Gauge("own", "", registry=registry).set(3)
    registry.register(DirectoryCollector(str(directory)))
    monkeypatch.setattr(logging.getLogger("vllm.starling"), "propagate", True)
    for _ in range(2):
        assert "own 3.0" in generate_latest(registry).decode()
    assert caplog.text.count("missing on /metrics") == 1
