"""The server of the soak: `starling serve` with a tiny random Llama, or plain `vllm serve` with the same options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.random_llama import make_tiny_llama
from benchmarks.soak.cases import PAGE_SIZE
from benchmarks.soak.target import PLAIN, STARLING, Target
from examples.server import Server, serving

API_KEY, ADMIN_KEY, QUEUE = "key-of-the-soak", "key-of-its-admin", 64
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--block-size", str(PAGE_SIZE), "--max-num-batched-tokens", "512"]
# So few pages that the load evicts cached pages and preempts requests, and that each page is soon touched.
OPTIONS += ["--num-gpu-blocks-override", "768", "--scheduling-policy", "priority"]
OPTIONS += ["--max-num-queued-reqs", str(QUEUE), "--api-key", API_KEY]
SCORES = [[0.4, 0.1], [0.2, 0.3]]
"""Of the tiny model's KV heads, for the requests with dense heads."""
ENVIRONMENT = {
    # One core for each engine. Clients and replicas share the cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # oneDNN would keep a primitive for each number of tokens of a step, up to 1,024 of them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "TORCHDYNAMO_DISABLE": "1",
}


def scores_options(folder: Path) -> list[str]:
    """Write the scores of the tiny model's KV heads to a file. Returns the options of a server that reads it."""
    path = folder / "scores.json"
    path.write_text(json.dumps({"scores": SCORES}))
    return ["--star-heads", str(path)]


@contextmanager
def soaked_server(folder: Path, log: Path, replicas: int, front: str = STARLING) -> Iterator[tuple[Server, Target]]:
    """Serve for the duration of the block. The server's temporary files are in ``folder / "tmp"``.

    Raises:
        RuntimeError: the server ends during its start, or takes longer than 300 s.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    os.environ.update(ENVIRONMENT | {"TMPDIR": str(temporary)})
    model = make_tiny_llama(folder / "tiny")
    options = [*OPTIONS, *(["--data-parallel-size", str(replicas)] if replicas > 1 else [])]
    if front == PLAIN:
        os.environ["VLLM_PLUGINS"] = ""
        start = serving(model, *options, log=log, seconds=300, grpc_port=None, program="vllm")
    else:
        own = ["--grpc-admin-key", ADMIN_KEY, *scores_options(folder)]
        start = serving(model, *options, *own, log=log, seconds=300)
    with start as server:
        http = server.http.removeprefix("http://")
        yield (
            server,
            Target(http, server.grpc, server.model, server.process.pid, API_KEY, ADMIN_KEY, QUEUE, replicas, front),
        )
