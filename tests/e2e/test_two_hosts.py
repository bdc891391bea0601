"""One server over two hosts, made from network namespaces: a prompt prefilled on both, and a wire that is cut."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.server import end_on_signals
from examples.two_hosts import available, counts, serving_on_both, two_hosts
from tests.e2e.models import make_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not available(), reason="needs root and network namespaces")]

TOLERANCE = 1e-5
COMPUTED = 'starling:computed_tokens_total{replica="0"}'
ON_THE_OTHER = 'starling:spread_blocks_total{replica="1"}'


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    end_on_signals()
    folder = tmp_path_factory.mktemp("hosts")
    options = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-num-batched-tokens", "32"]
    # Steps so small that a wire is cut in the middle of a prefill.
    model = make_tiny_llama(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use: 13 s
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
    assert grown("starling:bytes_moved_total") == 3 * 256 * 2 * 2 * 64 * 4  # tokens, layers, K and V, hidden, float32
    one = ask(client, model, prompt, 1, cache_salt="another")
    assert_same(both, one)


def test_kv_that_stays_on_the_other_host_is_attended_to_there(served):
    _, client, model = served
    prompt = random.Random(4).choices(range(3, 250), k=2088)
    before = counts(client)
    both = ask(client, model, prompt, 2, "on")
    after = counts(client)
    assert after["starling:bytes_moved_total"] == before["starling:bytes_moved_total"]
    sent = after["starling:shard_bytes_total"] - before.get("starling:shard_bytes_total", 0.0)
    assert sent == (40 + 5) * 2 * (2 * 64 + 2) * 4  # tokens, layers, query, output, 2 sums, float32
    assert_same(both, ask(client, model, prompt, 1, cache_salt="another"))


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
