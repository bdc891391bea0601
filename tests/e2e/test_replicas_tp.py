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
from examples.server import serving
from starling.scheduler.planning.assignment import ReplicaState
from tests.e2e.replicas import (
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
from tests.e2e.sockets import assert_sockets, documented_sockets, open_sockets
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

REPLICAS = 2
API_SERVERS = 2
TOKEN_BYTES = 2 * 2 * 64 * 4  # layers, K and V, hidden size, float32: both ranks together


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas_tp")
    settings = [*ENGINE_OPTIONS, "--data-parallel-size", str(REPLICAS), "--tensor-parallel-size", "2"]
    settings += ["--num-gpu-blocks-override", "400", "--api-server-count", str(API_SERVERS)]
    settings += ["--live-page", "on"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # four workers, possibly on two cores
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "600")  # the tests look for the process behind a connection
        model = make_tiny_llama(folder / "tiny")
        with serving(model, *settings, log=folder / "log", grpc_port=None) as server:
            yield server


def test_the_sockets_are_those_of_the_documentation(server):
    assert_sockets(lambda: open_sockets(server.process.pid), documented_sockets("Replicas and several API servers"))


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


def connect_to_each_api_server(server, stack: ExitStack) -> dict[int, HTTPConnection]:
    """Process id of each API server -> a connection to it, until the stack ends.

    The kernel chooses the API server of a connection. Those that have one are stopped, so that another one accepts.
    """
    connections: dict[int, HTTPConnection] = {}
    while len(connections) < API_SERVERS:
        stopped = [psutil.Process(pid) for pid in connections]
        for process in stopped:
            process.suspend()
        try:
            connection = stack.enter_context(closing(connect(server)))
            connection.request("GET", "/health")
            connection.getresponse().read()
        finally:
            for process in stopped:
                process.resume()
        connections[serving_process(server, connection.sock.getsockname()[1])] = connection
    return connections


def look(connection) -> dict:
    connection.request("GET", "/starling/live.json")
    return json.loads(connection.getresponse().read())


def ended(connection) -> list[tuple[str, int, int]]:
    """(id, generated tokens, replicas) of the requests that have ended, the last one first."""
    return [(row["id"], row["generated"], row["replicas"]) for row in look(connection)["ended"]]


def test_each_api_server_shows_the_requests_of_all(server):
    """A prompt that is split over both replicas, and its end."""
    with ExitStack() as stack:
        viewers = connect_to_each_api_server(server, stack)
        watched: dict[int, list[dict]] = {process: [] for process in viewers}

        def seen_half_done(rows: list[dict]) -> bool:
            return any(row["on"] == [0, 1] and 0 < row["star_blocks_done"] < 16 for row in rows)

        for number in range(50):  # an API server that is late on a busy machine shows the next prompt
            name = f"watched-{number}"
            client = stack.enter_context(closing(connect(server)))
            send(client, server, random_prompt(200 + number, 8000), options(2, 512), max_tokens=100, request_id=name)
            answered = stack.enter_context(ThreadPoolExecutor(1)).submit(client.getresponse)
            while not answered.done():
                for process, connection in viewers.items():
                    watched[process] += look(connection)["requests"]
            parse_completion(answered.result())
            if all(map(seen_half_done, watched.values())):
                break
        names = {f"cmpl-watched-{index}-0" for index in range(number + 1)}
        for process, connection in viewers.items():
            assert {row["id"] for row in watched[process]} <= names
            assert seen_half_done(watched[process])
            assert wait_until(lambda connection=connection: ended(connection)[:1] == [(f"cmpl-{name}-0", 100, 2)])
            assert len(set(ended(connection))) == len(ended(connection)), "the parts of a prompt are one request"


def test_each_api_server_splits_prompts(server):
    with ExitStack() as stack:
        for seed, connection in enumerate(connect_to_each_api_server(server, stack).values(), 100):
            prompt, star, before = random_prompt(seed, 2088), options(2), computed(server, REPLICAS)
            send(connection, server, prompt, star)
            output = parse_completion(connection.getresponse())
            assert computed_since(server, before) == expected(2088, star, [ReplicaState()] * REPLICAS)
            assert_same(output, complete_on_one(server, prompt, star))
