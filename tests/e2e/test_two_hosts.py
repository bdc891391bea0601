"""One server over two hosts, made from network namespaces: a prompt prefilled on both, and a wire that is cut."""

import itertools
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.server import end_on_signals
from examples.two_hosts import available, counts, serving_on_both, two_hosts
from tests.e2e.models import make_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not available(), reason="needs root and network namespaces")]

TOLERANCE = 1e-5
COMPUTED = 'starling:computed_tokens_total{replica="0"}'
ON_THE_OTHER = 'starling:spread_blocks_total{replica="1"}'
MOVED = "starling:bytes_moved_total"
FAILED = "starling:moves_failed_total"
TOKEN_BYTES = 2 * 2 * 64 * 4  # layers, K and V, hidden, float32


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    end_on_signals()
    folder = tmp_path_factory.mktemp("hosts")
    options = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-num-batched-tokens", "32"]
    # Steps so small that a wire is cut in the middle of a prefill.
    model = make_tiny_llama(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use: 13 s
        patch.setenv("STARLING_SILENCE_SECONDS", "10")
        with two_hosts() as hosts, serving_on_both(hosts, model, *options, folder=folder) as client:
            yield hosts, client, str(model)


def ask(client, model: str, prompt: list[int], replicas: int, shards: str = "off", **more) -> dict:
    star = {"star": "on", "star_block_size": 256, "star_query_tokens": 40, "star_replicas": replicas}
    star["star_shards"] = shards
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1, "vllm_xargs": star}
    response = client.post("/v1/completions", json=body | more)
    response.raise_for_status()
    return response.json()["choices"][0]["logprobs"]


def assert_same(one: dict, other: dict) -> None:
    assert one["tokens"] == other["tokens"]
    gaps = [abs(a - b) for a, b in zip(one["token_logprobs"], other["token_logprobs"], strict=True)]
    assert max(gaps) <= TOLERANCE


def test_both_hosts_prefill_and_the_answer_is_that_of_one(served):
    _, client, model = served
    prompt = random.Random(1).choices(range(3, 250), k=2088)
    before = counts(client)
    both = ask(client, model, prompt, 2)
    after = counts(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert [grown(f'starling:spread_blocks_total{{replica="{rank}"}}') for rank in (0, 1)] == [5, 3]
    assert grown(COMPUTED) == 5 * 256 + 40 + 5
    assert grown(MOVED) == 3 * 256 * TOKEN_BYTES
    one = ask(client, model, prompt, 1, cache_salt="another")
    assert_same(both, one)


def test_kv_that_stays_on_the_other_host_is_attended_to_there(served):
    _, client, model = served
    prompt = random.Random(40).choices(range(3, 250), k=2088)
    before = counts(client)
    both = ask(client, model, prompt, 2, "on")
    after = counts(client)
    assert after["starling:bytes_moved_total"] == before["starling:bytes_moved_total"]
    sent = after["starling:shard_bytes_total"] - before.get("starling:shard_bytes_total", 0.0)
    assert sent == (40 + 5) * 2 * (2 * 64 + 2) * 4  # tokens, layers, query, output, 2 sums, float32
    assert_same(both, ask(client, model, prompt, 1, cache_salt="another"))


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pages_used(client, model: str) -> float:
    """On this host, in parts of all. vLLM tells it at a step: a short prompt, kept from the other host, is one."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1}
    client.post("/v1/completions", json=body, headers={"X-data-parallel-rank": "0"}).raise_for_status()
    lines = client.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:kv_cache_usage_perc{") and 'engine="0"' in line)
    return float(line.rsplit(" ", 1)[1])


def test_a_wire_cut_in_the_middle_of_a_transfer_costs_time_and_no_answer(served):
    """What had not come is computed here, no page stays held, and once the wire is mended both hosts prefill again."""
    hosts, client, model = served
    prompt = random.Random(4).choices(range(3, 250), k=8000)
    alone = ask(client, model, prompt, 1, cache_salt="another")
    before, received = counts(client), hosts[0].received()
    hosts[1].throttle("3mbit")  # 15 blocks of 256 tokens, 3.9 MB, take 10 s
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, model, prompt, 2)
        until(lambda: hosts[0].received() - received > 1_000_000, 60)
        hosts[1].cut()
        assert_same(asked.result(timeout=90), alone)
    after = counts(client)
    assert after[FAILED] - before.get(FAILED, 0) == 1 and after[MOVED] == before[MOVED]
    assert after[COMPUTED] - before[COMPUTED] == 8000 + 5
    until(lambda: pages_used(client, model) == 0, 20)
    hosts[1].throttle(None)
    hosts[1].mend()
    prompts = (random.Random(seed).choices(range(3, 250), k=2088) for seed in itertools.count(5))
    deadline = time.monotonic() + 90
    for prompt in prompts:  # a new one each time: what one host has computed is not spread again
        answer = ask(client, model, prompt, 2)
        if counts(client)[ON_THE_OTHER] > after[ON_THE_OTHER]:
            break
        assert time.monotonic() < deadline
        time.sleep(1)
    assert counts(client)[MOVED] - after[MOVED] == 3 * 256 * TOKEN_BYTES
    assert_same(answer, ask(client, model, prompt, 1, cache_salt="another"))


def test_a_cut_wire_in_the_middle_of_a_prefill_costs_time_and_no_answer(served):
    """The last test: the host that can still be reached computes the whole prompt, and the next one too."""
    hosts, client, model = served
    prompts = [random.Random(seed).choices(range(3, 250), k=8000) for seed in (2, 3)]
    alone = [ask(client, model, prompt, 1, cache_salt="another") for prompt in prompts]
    started = counts(client)[COMPUTED]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, model, prompts[0], 2)
        deadline = time.monotonic() + 20
        while counts(client)[COMPUTED] == started:
            assert time.monotonic() < deadline
        hosts[1].cut()
        assert_same(asked.result(timeout=90), alone[0])
    before = counts(client)[ON_THE_OTHER]
    assert_same(ask(client, model, prompts[1], 2), alone[1])
    assert counts(client)[ON_THE_OTHER] == before
