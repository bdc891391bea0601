"""Two replicas of two tensor-parallel ranks each, with two API servers.

A rank fetches its half of each page from the same rank of the other replica. Each API server splits prompts by itself.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection

import psutil
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import end_on_signals, serving
from scheduler.star.assignment import ReplicaState
from tests.e2e.sockets import documented_sockets, open_sockets
from tests.e2e.test_replicas import (
    ENGINE_OPTIONS,
    assert_same,
    complete,
    complete_on_one,
    computed,
    computed_since,
    connect,
    expected,
    metrics,
    options,
    parse_completion,
    random_prompt,
    send,
)
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

REPLICAS = 2
API_SERVERS = 2
TOKEN_BYTES = 2 * 2 * 64 * 4  # layers, K and V, hidden size, float32: both ranks together


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    end_on_signals()
    folder = tmp_path_factory.mktemp("replicas_tp")
    settings = [*ENGINE_OPTIONS, "--data-parallel-size", str(REPLICAS), "--tensor-parallel-size", "2"]
    settings += ["--num-gpu-blocks-override", "400", "--api-server-count", str(API_SERVERS)]
    settings += ["--live-page", "on"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # four workers, possibly on two cores
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        model = make_tiny_llama(folder / "tiny")
        with serving(model, *settings, log=folder / "log", grpc_port=None, seconds=300) as server:
            yield server


def test_the_sockets_are_those_of_the_documentation(server):
    assert open_sockets(server.process.pid) == documented_sockets("Replicas and several API servers")


@pytest.mark.parametrize(
    ("seed", "length", "moved"),
    [(1, 2088, 3 * 256), (2, 1990, 3 * 256 - 128)],
    ids=["whole blocks", "ragged"],
)
def test_each_replica_computes_its_part_and_the_output_is_that_of_one_replica(server, seed, length, moved):
    prompt, star = random_prompt(seed, length), options(2)
    before, bytes_before = computed(server, REPLICAS), sum(metrics(server, "starling:bytes_moved_total").values())
    output = complete(server, prompt, star)
    assert computed_since(server, before) == expected(length, star, [ReplicaState()] * REPLICAS)
    assert output[2]["replicas"] == 2
    assert sum(metrics(server, "starling:bytes_moved_total").values()) - bytes_before == moved * TOKEN_BYTES
    assert_same(output, complete_on_one(server, prompt, star))


def serving_process(server, client_port: int) -> int:
    """Process id of the API server that accepted the connection from ``client_port``."""
    (pid,) = (
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if any(end.raddr and end.raddr.port == client_port for end in process.net_connections("tcp"))
    )
    return pid


def look(connection) -> dict:
    connection.request("GET", "/starling/live.json")
    return json.loads(connection.getresponse().read())


def test_each_api_server_shows_the_requests_of_all(server):
    """A prompt that is split over both replicas, and its end. The kernel chooses the API server of a connection."""
    with ExitStack() as stack:
        viewers: dict[int, HTTPConnection] = {}
        for _ in range(40):  # quickly: the server closes a connection that is idle for 5 s
            if len(viewers) == API_SERVERS:
                break
            connection = stack.enter_context(closing(connect(server)))
            connection.request("GET", "/health")
            connection.getresponse().read()
            viewers.setdefault(serving_process(server, connection.sock.getsockname()[1]), connection)
        assert len(viewers) == API_SERVERS
        client = stack.enter_context(closing(connect(server)))
        send(client, server, random_prompt(200, 8000), options(2, 512), max_tokens=100, request_id="watched")
        watched: dict[int, list[dict]] = {process: [] for process in viewers}
        answered = ThreadPoolExecutor(1).submit(client.getresponse)
        while not answered.done():
            for process, connection in viewers.items():
                watched[process] += look(connection)["requests"]
        parse_completion(answered.result())
        for process, connection in viewers.items():
            assert {row["id"] for row in watched[process]} == {"cmpl-watched-0"}
            assert any(row["on"] == [0, 1] and 0 < row["star_blocks_done"] < 16 for row in watched[process])
            assert wait_until(lambda connection=connection: len(look(connection)["ended"]) == 1)
            (row,) = look(connection)["ended"]
            assert (row["id"], row["generated"], row["replicas"]) == ("cmpl-watched-0", 100, 2)


def test_each_api_server_splits_prompts(server):
    seen: set[int] = set()
    for seed in range(100, 140):  # the kernel chooses the API server of a connection
        with closing(connect(server)) as connection:
            connection.request("GET", "/health")
            connection.getresponse().read()
            process = serving_process(server, connection.sock.getsockname()[1])
            if process in seen:
                continue
            seen.add(process)
            prompt, star, before = random_prompt(seed, 2088), options(2), computed(server, REPLICAS)
            send(connection, server, prompt, star)
            output = parse_completion(connection.getresponse())
            assert computed_since(server, before) == expected(2088, star, [ReplicaState()] * REPLICAS)
            assert_same(output, complete_on_one(server, prompt, star))
        if len(seen) == API_SERVERS:
            return
    pytest.fail(f"40 connections went to {len(seen)} of {API_SERVERS} API servers")
