"""Two replicas of two tensor-parallel ranks each, behind two API servers.

A rank reads its half of each page from its like; each API server splits prompts by itself.
"""

import json
from contextlib import closing
from http.client import HTTPConnection

import psutil
import pytest

from examples.server import end_on_signals, serving
from scheduler.spread import Replica
from tests.e2e.models import make_tiny_llama
from tests.e2e.test_replicas import (
    PAGE,
    answer_of,
    ask,
    assert_same,
    body,
    computed,
    expected,
    metrics,
    on_one,
    options,
    random_prompt,
)

pytestmark = pytest.mark.e2e

REPLICAS = 2
API_SERVERS = 2
TOKEN_BYTES = 2 * 2 * 64 * 4  # layers, K and V, hidden, float32: of both ranks together


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    end_on_signals()
    folder = tmp_path_factory.mktemp("replicas_tp")
    settings = ["--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager", "--max-num-batched-tokens", "128"]
    settings += ["--data-parallel-size", str(REPLICAS), "--tensor-parallel-size", "2"]
    settings += ["--num-gpu-blocks-override", "400", "--api-server-count", str(API_SERVERS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # four workers, maybe on two cores
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        model = make_tiny_llama(folder / "tiny")
        with serving(model, *settings, log=folder / "log", grpc_port=None, seconds=300) as server:
            yield server


@pytest.mark.parametrize(
    ("seed", "length", "moved"),
    [(1, 2088, 3 * 256), (2, 1990, 3 * 256 - 128)],
    ids=["whole blocks", "ragged"],
)
def test_each_replica_computes_its_part_and_the_answer_is_that_of_one(server, seed, length, moved):
    prompt, star = random_prompt(seed, length), options(2)
    before, bytes_before = computed(server, REPLICAS), sum(metrics(server, "starling:bytes_moved_total").values())
    answer = ask(server, prompt, star)
    work = [after - earlier for after, earlier in zip(computed(server, REPLICAS), before, strict=True)]
    assert work == expected(length, star, [Replica()] * REPLICAS)
    assert answer[2]["replicas"] == 2
    assert sum(metrics(server, "starling:bytes_moved_total").values()) - bytes_before == moved * TOKEN_BYTES
    assert_same(answer, on_one(server, prompt, star))


def serving_process(server, client_port: int) -> int:
    """Id of the API server's process that has taken a connection from that port."""
    (pid,) = (
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if any(end.raddr and end.raddr.port == client_port for end in process.net_connections("tcp"))
    )
    return pid


def test_each_api_server_spreads_prompts(server):
    seen: set[int] = set()
    for seed in range(100, 140):  # the kernel chooses which of them gets a connection
        with closing(HTTPConnection("127.0.0.1", int(server.http.rsplit(":", 1)[1]), timeout=60)) as connection:
            connection.request("GET", "/health")
            connection.getresponse().read()
            process = serving_process(server, connection.sock.getsockname()[1])
            if process in seen:
                continue
            seen.add(process)
            prompt, star, before = random_prompt(seed, 2088), options(2), computed(server, REPLICAS)
            asked = json.dumps(body(server, prompt, star))
            connection.request("POST", "/v1/completions", asked, {"content-type": "application/json"})
            answer = answer_of(connection.getresponse())
            work = [after - earlier for after, earlier in zip(computed(server, REPLICAS), before, strict=True)]
            assert work == expected(2088, star, [Replica()] * REPLICAS)
            assert_same(answer, on_one(server, prompt, star))
        if len(seen) == API_SERVERS:
            return
    pytest.fail(f"40 connections went to {len(seen)} of {API_SERVERS} API servers")
