"""Two servers on two hosts, which are network namespaces: each prefills parts of the other one's prompts."""

import json
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.two_hosts import GRPC_PORT, available, counts, ip, serving_as_peers, two_hosts
from tests.e2e.sockets import assert_sockets, documented_sockets
from tests.e2e.test_two_hosts import COMPUTED, MOVED, TOKEN_BYTES, assert_same, complete, sockets_of_host
from tests.e2e.wait import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("forked"),
    pytest.mark.skipif(not available(), reason="needs root and network namespaces"),
]

HERE, ON_PEERS = 'starling:split_blocks_total{replica="0"}', 'starling:split_blocks_total{replica="peers"}'
PARTS, USABLE = "starling:peer_parts_total", "starling:usable_peers"
LEFT_OUT = "starling:peers_left_out_total"
TIMEOUT_SECONDS = 15


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    # Steps so small that a server is killed during a prefill.
    options = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-num-batched-tokens", "32"]
    options += ["--additional-config", json.dumps({"starling": {"replicas": {"timeout": TIMEOUT_SECONDS}}})]
    model = make_tiny_llama(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use: 13 s
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /pause
        with (
            two_hosts() as hosts,
            serving_as_peers(hosts, model, *options, folder=folder) as (clients, processes),
        ):
            yield hosts, clients, processes, str(model)


@pytest.fixture(autouse=True)
def both_are_usable(served):
    """A server that took longer than 2 s to say what it is, on a busy machine, is left out until it is asked again."""
    assert wait_until(lambda: all(counts(client).get(USABLE) for client in served[1]))


def random_prompt(seed: int, length: int = 2088) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=length)


def test_the_sockets_are_those_of_the_documentation(served):
    for host in served[0]:
        listed = documented_sockets("Servers that are peers", VLLM_HOST_IP=host.address)
        assert_sockets(lambda host=host: sockets_of_host(host), listed)


@pytest.mark.parametrize("asked", [0, 1])
def test_both_servers_prefill_and_the_output_is_that_of_one(served, asked):
    _, clients, _, model = served
    client, other = clients[asked], clients[1 - asked]
    prompt = random_prompt(asked)
    before, before_there = counts(client), counts(other)
    both = complete(client, model, prompt, 2)
    after, after_there = counts(client), counts(other)
    assert [after[name] - before.get(name, 0) for name in (HERE, ON_PEERS)] == [5, 3]
    assert after[COMPUTED] - before[COMPUTED] == 5 * 256 + 40 + 5
    assert after_there[COMPUTED] - before_there[COMPUTED] == 256 + 3 * 256
    assert after[MOVED] - before[MOVED] == 3 * 256 * TOKEN_BYTES
    assert after_there[PARTS] - before_there[PARTS] == 1
    assert_same(both, complete(client, model, prompt, 1, cache_salt="another"))


def test_both_servers_prefill_documents_with_positions_of_their_own(served):
    """The head and three documents here, four there; all of them are found here in another order."""
    _, clients, _, model = served
    client, other = clients
    head, documents, query = (
        random_prompt(60, 250),
        [[2, *random_prompt(seed, 250)] for seed in range(61, 68)],
        [9] * 40,
    )

    def make_prompt(documents: list[list[int]]) -> list[int]:
        return head + [token for document in documents for token in document] + query

    starts = [len(head) + sum(map(len, documents[:number])) for number in range(len(documents))]
    star = {"star_segments": starts}  # all documents have equal lengths
    before, before_there = counts(client), counts(other)
    prompt = make_prompt(documents)
    both = complete(client, model, prompt, 2, star=star)
    after, after_there = counts(client), counts(other)
    assert [after[name] - before.get(name, 0) for name in (HERE, ON_PEERS)] == [4, 4]
    assert after[COMPUTED] - before[COMPUTED] == 4 * 256 + 40 + 5
    assert after_there[COMPUTED] - before_there[COMPUTED] == 224 + 4 * 256
    assert after[MOVED] - before[MOVED] == 4 * 256 * TOKEN_BYTES
    assert_same(both, complete(client, model, prompt, 1, star=star, cache_salt="another"))
    prompt, before = make_prompt(documents[::-1]), counts(client)
    turned = complete(client, model, prompt, 1, star=star)
    assert counts(client)[COMPUTED] - before[COMPUTED] <= 2 * 32 + 40 + 5
    assert_same(turned, complete(client, model, prompt, 1, star=star, cache_salt="another"))


def test_prompts_of_both_servers_at_once(served):
    """Each server prefills its own prompts and parts of the other's, and fetches pages while it is read itself.

    The second prompt has twice the blocks of the first one: whatever is left of that one, both servers get some.
    """
    _, clients, _, model = served
    prompts = [random_prompt(10), random_prompt(11, 16 * 256 + 40), *(random_prompt(seed) for seed in range(12, 18))]
    expected = [complete(clients[0], model, prompt, 1, cache_salt="another") for prompt in prompts]
    before = [counts(client) for client in clients]
    with ThreadPoolExecutor(len(prompts)) as pool:
        outputs = [pool.submit(complete, clients[0], model, prompts[0], 2)]
        assert wait_until(lambda: counts(clients[1])[COMPUTED] > before[1][COMPUTED])
        assert wait_until(lambda: counts(clients[1])[USABLE])
        outputs.append(pool.submit(complete, clients[1], model, prompts[1], 2))
        assert wait_until(lambda: counts(clients[0])[PARTS] > before[0][PARTS])
        outputs += [pool.submit(complete, clients[at % 2], model, prompts[at], 2) for at in range(2, len(prompts))]
        for output, alone in zip(outputs, expected, strict=True):
            assert output.result()["tokens"] == alone["tokens"]
    assert all(counts(client)[PARTS] > count[PARTS] for client, count in zip(clients, before, strict=True))


def test_a_call_without_the_key_of_the_peers_is_refused(served):
    """From the peer's own host, which reaches the port."""
    hosts = served[0]
    call = (
        "import grpc\n"
        "from starling.v1 import replica_pb2 as pb, replica_pb2_grpc\n"
        f"channel = grpc.insecure_channel('{hosts[0].address}:{GRPC_PORT}')\n"
        "try:\n"
        "    replica_pb2_grpc.ReplicaServiceStub(channel).Describe(pb.DescribeRequest(), timeout=300)\n"
        "except grpc.RpcError as error:\n"
        "    print(error.code().name)\n"
    )
    assert ip("netns", "exec", hosts[1].name, sys.executable, "-c", call).strip() == "UNAUTHENTICATED"


def of_engine(client, name: str) -> float:
    """A metric of a server's engine, which vLLM updates in each step."""
    (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(f"vllm:{name}{{"))
    return float(line.rsplit(" ", 1)[1])


def pages_held(client, model: str) -> float:
    """Fraction of a server's pages, after a step for a short prompt."""
    client.post("/v1/completions", json={"model": model, "prompt": [5, 6, 7], "max_tokens": 1}).raise_for_status()
    return of_engine(client, "kv_cache_usage_perc")


def parts_on(client) -> float:
    """Number of prompts and parts that a server's engine has."""
    return of_engine(client, "num_requests_running") + of_engine(client, "num_requests_waiting")


@contextmanager
def frozen(process):
    """All processes of a server stand still."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:
        each.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for each in processes:
            each.send_signal(signal.SIGCONT)


def assert_used_again(clients, model: str, seed: int) -> None:
    """The second server prefills a part of the first one's next prompt, and neither holds anything after it."""
    assert wait_until(lambda: all(counts(client)[USABLE] for client in clients))
    before = counts(clients[1])[PARTS]
    complete(clients[0], model, random_prompt(seed), 2)
    assert wait_until(lambda: counts(clients[1])[PARTS] == before + 1)
    for client in clients:
        assert wait_until(lambda client=client: pages_held(client, model) == 0)
        assert parts_on(client) == 0
        assert counts(client)["starling:quarantined_pages"] == 0


@pytest.mark.parametrize("moment", ["before the prompt", "during its part"])
def test_a_server_that_is_frozen_as_a_whole_is_not_waited_for_and_is_used_again(served, moment):
    _, clients, processes, model = served
    client, other = clients
    seed, length = (30, 2088) if moment == "before the prompt" else (32, 8000)
    prompt, left_out = random_prompt(seed, length), counts(client)[LEFT_OUT]
    alone = complete(client, model, prompt, 1, cache_salt="another")
    with ThreadPoolExecutor(1) as pool:
        if moment == "during its part":
            started = counts(other)[COMPUTED]
            output = pool.submit(complete, client, model, prompt, 2)
            assert wait_until(lambda: counts(other)[COMPUTED] > started)
        with frozen(processes[1]):
            if moment == "before the prompt":
                output = pool.submit(complete, client, model, prompt, 2)
            assert_same(output.result(timeout=300), alone)
            assert counts(client)[LEFT_OUT] > left_out and counts(client)[USABLE] == 0
            complete(client, model, random_prompt(seed + 1), "auto")
    assert_used_again(clients, model, seed + 10)


@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_a_server_that_is_paused_is_not_waited_for_and_is_used_again(served, mode):
    _, clients, _, model = served
    client, other = clients
    left_out, parts = counts(client)[LEFT_OUT], counts(other)[PARTS]
    other.post("/pause", params={"mode": mode}).raise_for_status()
    complete(client, model, random_prompt(50 + len(mode)), 2)
    assert counts(client)[LEFT_OUT] == left_out + 1
    assert counts(other)[PARTS] == parts
    other.post("/resume").raise_for_status()
    assert_used_again(clients, model, 55 + len(mode))


def test_a_server_that_is_killed_leaves_its_peer_with_the_prompt_and_without_its_pages(served):
    """The last test: one prompt of each server is prefilled on both when the second server is killed."""
    _, clients, processes, model = served
    client, other = clients
    prompts = [random_prompt(seed, 8000) for seed in (20, 21)]
    alone = complete(client, model, prompts[0], 1, cache_salt="another")
    started = counts(other)[COMPUTED]
    with ThreadPoolExecutor(2) as pool:
        output = pool.submit(complete, client, model, prompts[0], 2)
        assert wait_until(lambda: counts(other)[COMPUTED] > started)
        lost = pool.submit(complete, other, model, prompts[1], 2)
        assert wait_until(lambda: parts_on(client) > 1 or output.done())
        processes[1].kill()
        assert_same(output.result(timeout=300), alone)
        assert isinstance(lost.exception(timeout=300), Exception)
    assert wait_until(lambda: counts(client)[USABLE] == 0)
    assert wait_until(lambda: pages_held(client, model) == 0)
    assert_same(complete(client, model, prompts[0], 2), alone)
