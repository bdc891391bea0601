"""Servers that get prompts of documents, and the cost of a gateway: `python -m benchmarks.routing`.

Two servers, each with KV memory for half of 100 documents, get 200 prompts of eight of them, two at a time. The prompts
go through vllm-router and SMG with their policies, and through examples/document_router.py. Each policy begins with
empty caches. Documents are drawn from all 100, or from one of five topics of 20. Counted are the tokens that the
servers compute; the seconds are those until the first token.

The second part sends short prompts to a server directly and through each gateway, in turns. Writes results/routing.json
and .png. Takes about 15 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.gateway_process import DOCUMENT_ROUTER, SMG, VLLM_ROUTER, gateway_before, is_installed
from benchmarks.random_llama import make_random_llama
from benchmarks.report import saved_figure, write_json
from benchmarks.soak.target import series_sum
from examples.server import Server, free_ports, serving
from starling.lab.statistics import ratio_interval
from starling.v1 import admin_pb2, admin_pb2_grpc

DOCUMENTS, RETRIEVED, TOPICS, MARK = 100, 8, 5, "|"
DOCUMENT_TOKENS, HEAD_TOKENS, PAGE = 480, 256, 32
ROOM = (HEAD_TOKENS + DOCUMENTS // 2 * (DOCUMENT_TOKENS + PAGE)) // PAGE + 300  # 300 pages: prompts that run
ADMIN_KEY = "key-of-the-benchmark"
DIRECT = "direct"
ANY, TOPIC = "any 8 of 100", "8 of a topic of 20"


def text(name: str, tokens: int) -> str:
    """Return a text of ``tokens`` tokens, one for each character."""
    return hashlib.shake_256(name.encode()).hexdigest(tokens)[:tokens]


def make_prompts(kind: str, number: int) -> list[tuple[list[int], str]]:
    """Return (documents, prompt) of each request, with a question of its own."""
    draw, prompts = random.Random(0), []
    for index in range(number):
        first, size = (0, DOCUMENTS) if kind == ANY else (draw.randrange(TOPICS) * 20, 20)
        chosen = draw.sample(range(first, first + size), RETRIEVED)
        parts = [text("head", HEAD_TOKENS), *(text(f"document {each}", DOCUMENT_TOKENS - 1) for each in chosen)]
        prompts.append((chosen, MARK.join([*parts, text(f"question {index}", 40)])))
    return prompts


@contextlib.contextmanager
def two_servers(folder: Path, model: Path) -> Iterator[list[Server]]:
    options = ["--served-model-name", "random", "--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager"]
    options += ["--star", "on", "--star-segments", MARK, "--enable-prompt-tokens-details"]
    options += ["--num-gpu-blocks-override", str(ROOM), "--max-model-len", "8192", "--grpc-admin-key", ADMIN_KEY]
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        servers = []
        for number, (zmq, port) in enumerate(zip(free_ports(0, 0), free_ports(0, 0), strict=True)):
            events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{zmq}"}
            own = ["--kv-events-config", json.dumps(events)]
            log = folder / f"server{number}.log"
            servers.append(stack.enter_context(serving(model, *options, *own, log=log, grpc_port=port)))
        yield servers


def reset(servers: Sequence[Server]) -> None:
    """Empty the servers' caches."""
    for server in servers:
        with grpc.insecure_channel(server.grpc) as channel:
            metadata = [("authorization", f"Bearer {ADMIN_KEY}")]
            admin_pb2_grpc.AdminServiceStub(channel).ResetPrefixCache(
                admin_pb2.ResetPrefixCacheRequest(), metadata=metadata
            )


def computed(servers: Sequence[Server]) -> float:
    return sum(
        series_sum(httpx.get(f"{server.http}/metrics").text, "starling:computed_tokens_total") for server in servers
    )


def send(client: httpx.Client, prompt: str, headers: dict[str, str]) -> float:
    """Return the seconds until the first token of a prompt."""
    body = {"model": "random", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    client.post("/v1/completions", json=body, headers=headers).raise_for_status()
    return time.perf_counter() - started


def run_policy(url: str, servers: Sequence[Server], prompts: list[tuple[list[int], str]], name: str) -> dict[str, Any]:
    """Send all prompts through an address, two at a time; returns tokens computed, and the seconds of each."""
    reset(servers)
    before = computed(servers)
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(2) as pool:

        def one(request: tuple[list[int], str]) -> float:
            documents, prompt = request
            key = "-".join(map(str, sorted(documents)))  # a session: the set of documents
            return send(client, prompt, {"x-session-id": key, "x-smg-routing-key": key})

        seconds = list(track(pool.map(one, prompts), name, len(prompts), transient=True))
    return {"computed": computed(servers) - before, "seconds": seconds}


def policies() -> list[tuple[str, str, str]]:
    """Return (name, gateway, policy) of each way to choose a server."""
    ways = [("round robin", VLLM_ROUTER, "round_robin"), ("prefix (cache_aware)", VLLM_ROUTER, "cache_aware")]
    ways += [("consistent hash of the set", VLLM_ROUTER, "consistent_hash")]
    ways += [("prefix, KV events (cache_aware)", SMG, "cache_aware"), ("documents", DOCUMENT_ROUTER, "")]
    return [way for way in ways if is_installed(way[1])]


def measure_routing(folder: Path, servers: Sequence[Server], number: int) -> dict[str, dict[str, Any]]:
    """Return kind of prompts -> policy -> its result."""
    result: dict[str, dict[str, Any]] = {}
    for kind in (ANY, TOPIC):
        prompts = make_prompts(kind, number)
        result[kind] = {"prompt_tokens": sum(len(prompt) for _, prompt in prompts)}
        for name, gateway, policy in policies():
            label = f"{gateway}: {name}"
            with gateway_before(gateway, servers, folder / "gateway.log", policy) as url:
                result[kind][label] = run_policy(url, servers, prompts, label)
    return result


def measure_overhead(folder: Path, servers: Sequence[Server], rounds: int) -> dict[str, list[float]]:
    """Return way -> seconds of short prompts, sent in turns."""
    first = servers[:1]
    with ExitStack() as stack:
        urls = {DIRECT: first[0].http}
        for gateway in filter(is_installed, (SMG, VLLM_ROUTER, DOCUMENT_ROUTER)):
            name = Path(gateway).name
            urls[name] = stack.enter_context(gateway_before(gateway, first, folder / f"{name}.log"))
        clients = {way: stack.enter_context(httpx.Client(base_url=url, timeout=300)) for way, url in urls.items()}
        times: dict[str, list[float]] = {way: [] for way in clients}
        for index in range(-3, rounds):
            for way, client in clients.items():
                seconds = send(client, text(f"{way} {index}", 100), {})
                if index >= 0:
                    times[way].append(seconds)
    return times


def plot(routing: dict[str, dict[str, Any]], path: Path) -> None:
    with saved_figure(path, 1, len(routing), figsize=(11, 3.2), sharey=True) as (_, axes):
        for axis, (kind, found) in zip(axes, routing.items(), strict=True):
            names = [name for name in found if name != "prompt_tokens"]
            shares = [100 * found[name]["computed"] / found["prompt_tokens"] for name in names]
            axis.barh(names[::-1], shares[::-1])
            axis.set_title(f"documents: {kind}")
            axis.set_xlabel("tokens computed, % of the prompts' tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="prompts of each policy (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="short prompts of each way (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 8192}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
        model = make_random_llama(folder / "random", **shape, **heads)
        with two_servers(folder, model) as servers:
            routing = measure_routing(folder, servers, args.prompts)
            overhead = measure_overhead(folder, servers, args.rounds)
    table = Table("documents", "way", "tokens computed", "of the prompts'", "first token, mean")
    for kind, found in routing.items():
        for way in [way for way in found if way != "prompt_tokens"]:
            share = found[way]["computed"] / found["prompt_tokens"]
            found[way]["share"] = share
            mean = statistics.fmean(found[way]["seconds"])
            table.add_row(kind, way, f"{found[way]['computed']:,.0f}", f"{share:.0%}", f"{mean:.3f} s")
    added = Table("way", "first token, median", "added", "ratio", "95 %")
    for way, seconds in overhead.items():
        ratio, low, high = ratio_interval(overhead[DIRECT], seconds)
        median, more = statistics.median(seconds), statistics.median(seconds) - statistics.median(overhead[DIRECT])
        added.add_row(way, f"{1e3 * median:.1f} ms", f"{1e3 * more:.1f} ms", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")
    console = Console(width=140)
    console.print(table, added)
    path = write_json("routing", {"routing": routing, "overhead": overhead})
    plot(routing, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
