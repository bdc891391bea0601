"""One server over two hosts, which are network namespaces: a prompt prefilled on both, and a network that is cut."""

import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.two_hosts import available, counts, ip, serving_on_both, two_hosts
from tests.e2e.sockets import Socket, assert_sockets, documented_sockets, of_process
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not available(), reason="needs root and network namespaces")]

TOLERANCE = 1e-5
COMPUTED = 'starling:computed_tokens_total{replica="0"}'
ON_THE_OTHER = 'starling:split_blocks_total{replica="1"}'
MOVED = "starling:bytes_moved_total"
FAILED = "starling:moves_failed_total"
TOKEN_BYTES = 2 * 2 * 64 * 4  # layers, K and V, hidden size, float32


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    # Steps so small that the network is cut during a prefill.
    options = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-num-batched-tokens", "32"]
    model = make_tiny_llama(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use: 13 s
        with two_hosts() as hosts, serving_on_both(hosts, model, *options, folder=folder) as client:
            for host, log in zip(hosts, ("here.log", "there.log"), strict=True):
                # Not on the loopback device, nor on others that a host may have.
                assert f"over the network devices {host.device} (" in (folder / log).read_text()
            yield hosts, client, str(model)


def complete(
    client, model: str, prompt: list[int], replicas: int, shards: str = "off", star: dict | None = None, **more
) -> dict:
    """The tokens and logprobs of one completion, with these further star options."""
    star = {"star": "on", "star_block_size": 256, "star_query_tokens": 40, "star_replicas": replicas} | (star or {})
    star["star_shards"] = shards
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1, "vllm_xargs": star}
    response = client.post("/v1/completions", json=body | more)
    response.raise_for_status()
    return response.json()["choices"][0]["logprobs"]


def assert_same(one: dict, other: dict) -> None:
    assert one["tokens"] == other["tokens"]
    gaps = [abs(a - b) for a, b in zip(one["token_logprobs"], other["token_logprobs"], strict=True)]
    assert max(gaps) <= TOLERANCE


def sockets_of_host(host) -> set[Socket]:
    pids = map(int, ip("netns", "pids", host.name).split())
    return {socket for pid in pids for socket in of_process(psutil.Process(pid))}


def test_the_sockets_are_those_of_the_documentation(served):
    """The first host has all of them, the second one those of its engine and worker."""
    here, there = served[0]
    listed = [documented_sockets("Replicas on several hosts", VLLM_HOST_IP=host.address) for host in (here, there)]
    assert_sockets(lambda: sockets_of_host(here), listed[0])
    listed[1] = {socket for socket in listed[1] if socket.process in ("VLLM::EngineCore", "VLLM::Worker")}
    assert_sockets(lambda: sockets_of_host(there), listed[1])


def test_both_hosts_prefill_and_the_output_is_that_of_one_host(served):
    _, client, model = served
    prompt = random.Random(1).choices(range(3, 250), k=2088)
    before = counts(client)
    both = complete(client, model, prompt, 2)
    after = counts(client)

    def increase(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert [increase(f'starling:split_blocks_total{{replica="{rank}"}}') for rank in (0, 1)] == [5, 3]
    assert increase(COMPUTED) == 5 * 256 + 40 + 5
    assert increase(MOVED) == 3 * 256 * TOKEN_BYTES
    one = complete(client, model, prompt, 1, cache_salt="another")
    assert_same(both, one)


def test_queries_attend_on_the_other_host_to_kv_that_stays_there(served):
    _, client, model = served
    prompt = random.Random(40).choices(range(3, 250), k=2088)
    before = counts(client)
    both = complete(client, model, prompt, 2, "on")
    after = counts(client)
    assert after["starling:bytes_moved_total"] == before["starling:bytes_moved_total"]
    sent = after["starling:shard_bytes_total"] - before.get("starling:shard_bytes_total", 0.0)
    assert sent == (40 + 5) * 2 * (2 * 64 + 2) * 4  # tokens, layers, query and output, 2 log-sum-exps, float32
    assert_same(both, complete(client, model, prompt, 1, cache_salt="another"))


def pages_used(client, model: str) -> float:
    """Fraction of this host's pages. vLLM updates the metric in a step, so this host gets a short prompt."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1}
    client.post("/v1/completions", json=body, headers={"X-data-parallel-rank": "0"}).raise_for_status()
    lines = client.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:kv_cache_usage_perc{") and 'engine="0"' in line)
    return float(line.rsplit(" ", 1)[1])


def test_a_network_cut_during_a_transfer_delays_the_output_and_releases_all_pages(served):
    """This host computes the missing pages itself. Once the network works again, both hosts prefill."""
    hosts, client, model = served
    prompt = random.Random(4).choices(range(3, 250), k=8000)
    alone = complete(client, model, prompt, 1, cache_salt="another")
    before, received = counts(client), hosts[0].received()
    hosts[1].throttle("1mbit")  # 15 blocks of 256 tokens, 3.9 MB, take 30 s
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(complete, client, model, prompt, 2)
        assert wait_until(lambda: hosts[0].received() - received > 1_000_000)
        hosts[1].cut()
        assert_same(output.result(timeout=300), alone)
    after = counts(client)
    assert after[FAILED] - before.get(FAILED, 0) == 1 and after[MOVED] == before[MOVED]
    assert after[COMPUTED] - before[COMPUTED] == 8000 + 5
    assert wait_until(lambda: pages_used(client, model) == 0)
    hosts[1].throttle(None)
    hosts[1].mend()
    prompts = (random.Random(seed).choices(range(3, 250), k=2088) for seed in itertools.count(5))
    deadline = time.monotonic() + 300
    for prompt in prompts:  # new ones, as a prompt that one host has cached is not split again
        output = complete(client, model, prompt, 2)
        if counts(client)[ON_THE_OTHER] > after[ON_THE_OTHER]:
            break
        assert time.monotonic() < deadline
        time.sleep(1)
    assert counts(client)[MOVED] - after[MOVED] == 3 * 256 * TOKEN_BYTES
    assert_same(output, complete(client, model, prompt, 1, cache_salt="another"))


def test_a_network_cut_during_a_prefill_delays_the_output(served):
    """The last test: the host that can still be reached computes the whole prompt, and also the next one."""
    hosts, client, model = served
    prompts = [random.Random(seed).choices(range(3, 250), k=8000) for seed in (2, 3)]
    alone = [complete(client, model, prompt, 1, cache_salt="another") for prompt in prompts]
    started = counts(client)[COMPUTED]
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(complete, client, model, prompts[0], 2)
        assert wait_until(lambda: counts(client)[COMPUTED] != started)
        hosts[1].cut()
        assert_same(output.result(timeout=300), alone[0])
    before = counts(client)[ON_THE_OTHER]
    assert_same(complete(client, model, prompts[1], 2), alone[1])
    assert counts(client)[ON_THE_OTHER] == before
