"""The servers of the soak: `starling serve` with a tiny random Llama, or plain `vllm serve` with the same options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.random_llama import make_tiny_llama
from benchmarks.soak.cases import PAGE_SIZE
from benchmarks.soak.target import PLAIN, STARLING, Target
from examples.server import Server, serving

API_KEY, HOSTILE_KEY, ADMIN_KEY, QUEUE = "key-of-the-soak", "key-of-its-hostile-clients", "key-of-its-admin", 64
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--block-size", str(PAGE_SIZE), "--max-num-batched-tokens", "512"]
# So few pages that the load evicts cached pages and preempts requests, and that each page is soon touched.
OPTIONS += ["--num-gpu-blocks-override", "768", "--scheduling-policy", "priority"]
OPTIONS += ["--max-num-queued-reqs", str(QUEUE), "--api-key", API_KEY, HOSTILE_KEY]
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


@dataclass(frozen=True)
class Soaked:
    """A server of the soak.

    Attributes:
        temporary: its folder of temporary files.
    """

    name: str
    server: Server
    target: Target
    temporary: Path


@contextmanager
def soaked_servers(folder: Path, logs: Path, replicas: int, front: str = STARLING) -> Iterator[list[Soaked]]:
    """Serve for the duration of the block: one server with replicas.

    Args:
        logs: folder of the servers' logs.

    Raises:
        RuntimeError: a server ends during its start, or takes longer than 300 s.
    """
    model = make_tiny_llama(folder / "tiny")
    scores = scores_options(folder)
    with ExitStack() as stack:
        os.environ.update(ENVIRONMENT)

        def start(name: str, *options: str, grpc_port: int = 0, **facts: Any) -> Soaked:
            temporary = folder / f"tmp {name}"
            temporary.mkdir()
            os.environ["TMPDIR"] = str(temporary)
            log = logs / f"soak-{front}-{name.replace(' ', '-')}.log"
            if front == PLAIN:
                os.environ["VLLM_PLUGINS"] = ""
                serve = serving(model, *OPTIONS, *options, log=log, seconds=300, grpc_port=None, program="vllm")
            else:
                own = ["--grpc-admin-key", ADMIN_KEY, "--live-page", "on", *scores, *options]
                serve = serving(model, *OPTIONS, *own, log=log, seconds=300, grpc_port=grpc_port)
            server = stack.enter_context(serve)
            http = server.http.removeprefix("http://")
            keys = {"api_key": API_KEY, "admin_key": ADMIN_KEY, "hostile_key": HOSTILE_KEY}
            target = Target(http, server.grpc, server.model, server.process.pid, **keys, queue=QUEUE, **facts)
            return Soaked(name, server, target, temporary)

        engines = "one engine" if replicas == 1 else f"{replicas} replicas"
        data_parallel = ["--data-parallel-size", str(replicas)] if replicas > 1 else []
        yield [start(engines, *data_parallel, replicas=replicas, front=front)]
