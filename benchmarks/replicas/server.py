"""The server of the benchmarks: `starling serve` with two replicas of a random Llama, each on its own core."""

from __future__ import annotations

import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.random_llama import make_random_llama
from benchmarks.star_ttft import RANDOM_LLAMA
from examples.server import Server, end_on_signals, serving

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "2048", "--max-num-seqs", "4"]
OPTIONS += ["--data-parallel-size", "2"]
SHARED_MEMORY, TCP = "shared memory", "TCP"


@contextmanager
def two_replicas(max_model_len: int, transport: str) -> Iterator[Server]:
    """Serve for the duration of the block and yield the server; a signal stops the server too.

    Args:
        transport: transport of pages and messages between the replicas, SHARED_MEMORY or TCP.

    Raises:
        RuntimeError: the server ends during its start, or takes longer than 300 s.
    """
    end_on_signals()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if transport == TCP:
        os.environ["UCX_TLS"] = "tcp"
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_llama(Path(folder) / "llama", **RANDOM_LLAMA)
        options = [*OPTIONS, "--max-model-len", str(max_model_len)]
        print(f"Starting two replicas, transport: {transport}", flush=True)
        with serving(model, *options, log=Path(folder) / "log", seconds=300) as server:
            yield server


def completion_request(server: Server, ids: list[int], star: dict[str, Any], **fields: Any) -> urllib.request.Request:
    """Return a greedy completion with these star options; ``fields`` are further ones of the body."""
    body = {"model": server.model, "prompt": ids, "temperature": 0, "vllm_xargs": star} | fields
    headers = {"content-type": "application/json"}
    return urllib.request.Request(f"{server.http}/v1/completions", json.dumps(body).encode(), headers)


def counters(server: Server, names: tuple[str, ...]) -> dict[str, float]:
    """Return the values of the server's metrics with these names, which have no labels."""
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=10) as response:
        lines = [line.split() for line in response.read().decode().splitlines() if line.startswith(names)]
    return {name: float(value) for name, value in lines}
