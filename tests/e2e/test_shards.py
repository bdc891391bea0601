"""One `starling serve` with three data-parallel replicas, where KV stays on the replica that computed it.

Outputs are compared with those of one replica with the same plan. If a prompt exceeds the memory of one replica, its
output is compared with Transformers under the explicit mask. Each test counts the bytes that go between the replicas,
so that an output of one replica alone, or one from pages that were moved, does not pass. The last test stops a replica
that holds KV.
"""

import json
import os
import signal
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psutil
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import serving
from tests.e2e.replicas import (
    ENGINE_OPTIONS,
    PAGE_SIZE,
    REPLICAS,
    TOKENS,
    assert_same,
    complete,
    complete_on_one,
    complete_over_grpc,
    computed,
    computed_since,
    connect,
    metrics,
    options,
    post,
    random_prompt,
    send,
)
from tests.e2e.test_replicas import CONCURRENT_TOLERANCE, documents_of, prompt_of_documents
from tests.e2e.wait import wait_until
from tests.parity.harness import mask_of, reference_logprobs

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

LAYERS, HEADS, HIDDEN = 2, 2, 64
NUM_PAGES = 99
"""Pages of each replica, for 3,168 tokens."""

BYTES = LAYERS * (2 * HIDDEN + HEADS) * 4
"""Bytes of a query token, its partial output and the log-sum-exp of each head, in float32."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    arguments = [*ENGINE_OPTIONS, "--data-parallel-size", str(REPLICAS), "--star-shards", "on"]
    arguments += ["--num-gpu-blocks-override", str(NUM_PAGES + 1), "--max-logprobs", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a machine may have fewer cores than replicas
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use
        model = make_tiny_llama(folder / "tiny")
        with serving(model, *arguments, log=folder / "log") as server:
            yield server


def moved(server) -> tuple[float, float]:
    """Bytes of pages, and bytes of queries and partial outputs, that replicas have sent to one another so far."""
    names = ("starling:bytes_moved_total", "starling:shard_bytes_total")
    pages, shards = (sum(metrics(server, name).values()) for name in names)
    return pages, shards


def query_bytes(length: int, star: dict, tokens: int = TOKENS) -> int:
    """Bytes of the queries and partial outputs of a prompt that is split over ``star_replicas`` replicas.

    The query and the output attend on each other replica. The context's tokens after its last whole page attend on the
    replica that has the rest of their star block.
    """
    end = length - star["star_query_tokens"]
    tail = end % PAGE_SIZE if end % star["star_block_size"] >= PAGE_SIZE else 0
    return BYTES * (tail + (length - end + tokens - 1) * (star["star_replicas"] - 1))


def no_page_is_held(server) -> bool:
    """Whether no replica uses a page. vLLM updates the metric in a step, so each replica gets a short prompt."""
    for rank in range(REPLICAS):
        complete_on_rank(server, rank, random_prompt(rank, 20))
    return not any(metrics(server, "vllm:kv_cache_usage_perc").values())


def complete_on_rank(server, rank: int, prompt: list[int], star: dict | None = None):
    """(tokens, logprobs) of a completion on the replica of that rank."""
    with post(server, prompt, star or {"star": "off"}, {"x-data-parallel-rank": str(rank)}) as response:
        choice = json.loads(response.read())["choices"][0]
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]


def assert_equals_reference(server, prompt: list[int], star: dict, output) -> None:
    """Compare the log probabilities of an output's tokens with those of Transformers under the explicit mask."""
    ids = prompt + [int(token.removeprefix("token_id:")) for token in output[0]]
    numbers = {"block_size": star["star_block_size"], "anchor_size": star["star_block_size"], "overlap_size": 0}
    mask = mask_of(numbers | {"context_end": len(prompt) - star["star_query_tokens"]}, len(ids))
    reference = reference_logprobs(server.model, ids, mask)[-TOKENS:].tolist()
    assert max(abs(a - b) for a, b in zip(output[1], reference, strict=True)) <= 1e-4


@pytest.mark.parametrize("replicas", [2, 3])
def test_documents_with_positions_of_their_own_stay_where_they_were_computed(server, replicas):
    """Query and output, turned for each document, attend to it there; each token is sent once to each replica."""
    (prompt, context), before, counted = prompt_of_documents(300 * replicas), computed(server), moved(server)
    star = documents_of(prompt) | {"star_replicas": replicas}
    output = complete(server, prompt, star)
    query = star["star_query_tokens"] + TOKENS - 1
    assert sum(computed_since(server, before)) == context + (replicas - 1) * 64 + query
    assert output[2]["replicas"] == replicas and output[2]["shards"]
    assert [after - earlier for after, earlier in zip(moved(server), counted, strict=True)] == [
        0,
        BYTES * query * (replicas - 1),
    ]
    assert_same(output, complete_on_one(server, prompt, star))


@pytest.mark.parametrize(
    ("seed", "length", "star"),
    [
        (1, 2088, options(2)),  # 8 blocks
        (2, 1990, options(2)),  # 8, the last one ends within a page
        (3, 2350, options(2, 256, 40)),  # 10, the last one of 6 tokens
        (4, 2088, options(3)),
        (5, 3001, options(3, 320, 5)),
    ],
    ids=["2 replicas", "2, ragged", "2, short last block", "3 replicas", "3, ragged"],
)
def test_no_page_moves_and_the_output_is_that_of_one_replica(server, seed, length, star):
    prompt, before = random_prompt(seed, length), moved(server)
    output = complete(server, prompt, star)
    after = moved(server)
    assert after[0] == before[0]
    assert after[1] - before[1] == query_bytes(length, star)
    assert (output[2]["replicas"], output[2]["shards"]) == (star["star_replicas"], True)
    assert_same(output, complete_on_one(server, prompt, star))


def test_a_prompt_may_exceed_the_memory_of_one_replica(server):
    star, prompt, before = options(3), random_prompt(10, 4500), moved(server)
    output = complete(server, prompt, star)
    assert moved(server) == (before[0], before[1] + query_bytes(4500, star))
    assert_equals_reference(server, prompt, star, output)
    again = computed(server)
    assert_same(complete(server, prompt, star), output)
    assert sum(computed_since(server, again)) < 4500 / 4  # each replica has its star blocks in the prefix cache


@pytest.mark.parametrize(
    ("length", "star", "words"),
    [
        (4500, {"star": "off"}, ["runs on one replica", "3168"]),
        (4500, options(3) | {"star_shards": "off"}, ["runs on one replica", "star_shards='off'"]),
        (8100, options(2), ["star_shards='on'", "than 2 replicas of 99 pages"]),
        (1000, options(1) | {"star_shards": "on"}, ["star_shards='on'", "star_replicas=1"]),
        (1000, options(2) | {"star_shards": "maybe"}, ["star_shards='maybe'", "off, on"]),
    ],
    ids=["dense", "fetched", "too few replicas", "one replica", "no such value"],
)
def test_prompts_and_options_that_this_server_can_not_fulfil_give_400(server, length, star, words):
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(server, random_prompt(1, length), star)
    text = refused.value.read().decode()
    assert refused.value.code == 400 and all(word in text for word in words), text


def test_a_dense_output_ends_when_the_memory_of_its_replica_is_full(server):
    tokens, _, _ = complete(server, random_prompt(11, 3100), {"star": "off"}, max_tokens=500)
    assert len(tokens) == NUM_PAGES * PAGE_SIZE - 3100


def test_concurrent_prompts_that_exceed_one_replica_run_beside_short_and_dense_ones(server):
    star, before = options(3), moved(server)
    long = [random_prompt(seed, length) for seed, length in ((20, 4500), (21, 4300))]
    others = [
        (random_prompt(22, 1500), options(2)),
        *((random_prompt(seed, 90 + seed), None) for seed in range(23, 29)),
    ]
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(complete, server, prompt, star) for prompt in long]
        futures += [pool.submit(complete, server, prompt, other or {"star": "off"}) for prompt, other in others]
        outputs = [future.result() for future in futures]
    assert moved(server)[0] == before[0]
    assert moved(server)[1] - before[1] >= sum(query_bytes(len(prompt), star) for prompt in long)
    for prompt, output in zip(long, outputs[:2], strict=True):
        assert_equals_reference(server, prompt, star, output)
    assert_same(outputs[2], complete_on_one(server, *others[0]), CONCURRENT_TOLERANCE)
    for (prompt, _), output in zip(others[1:], outputs[3:], strict=True):
        assert_same(output, complete(server, prompt, {"star": "off"}, cache_salt="another"), CONCURRENT_TOLERANCE)
    assert wait_until(lambda: no_page_is_held(server))


def test_cached_pages_of_a_divided_prompt_serve_every_other_kind_of_request(server):
    prompt, star = random_prompt(30, 2088), options(3)
    shards = complete(server, prompt, star)
    dense = complete(server, prompt, {"star": "off"}, cache_salt="another")
    assert max(abs(a - b) for a, b in zip(shards[1], dense[1], strict=True)) > 0.01  # or the test would show nothing
    for rank in range(REPLICAS):
        assert_same(complete_on_rank(server, rank, prompt), dense)
    before = moved(server)
    assert_same(complete(server, prompt, star | {"star_shards": "off"}), shards)
    assert moved(server)[0] > before[0] and moved(server)[1] == before[1]  # the pages are fetched now
    for rank in range(REPLICAS):
        assert_same(complete_on_rank(server, rank, prompt, star | {"star_replicas": 1}), shards)


def test_each_choice_attends_on_the_other_replicas(server):
    prompt, star, before = random_prompt(32, 2088), options(2), moved(server)
    sampling = {"n": 2, "temperature": 1, "seed": 1, "logprobs": 1}

    def texts(star: dict, **more) -> list[list[str]]:
        with post(server, prompt, star, **sampling, **more) as response:
            return [choice["logprobs"]["tokens"] for choice in json.loads(response.read())["choices"]]

    assert texts(star) == texts(star | {"star_replicas": 1}, cache_salt="another")
    # The second choice finds the query's whole pages in the cache, or runs in the same step.
    assert query_bytes(2088, star) + BYTES * (TOKENS - 1) < moved(server)[1] - before[1] <= 2 * query_bytes(2088, star)


def test_a_grpc_request_attends_on_the_other_replicas(server):
    prompt, star = random_prompt(31, 2088), options(2)
    before = moved(server)
    expected = complete_on_one(server, prompt, star)
    output = complete_over_grpc(server, prompt, replicas=2, shards=True)
    assert output[2].shards
    assert_same(output, expected)
    assert moved(server)[1] - before[1] == query_bytes(2088, star)


@contextmanager
def streaming(server, prompt: list[int], star: dict, tokens: int):
    """The lines of a streamed response after its first event; leaving the block cancels the request."""
    with closing(connect(server)) as connection:
        send(connection, server, prompt, star, stream=True, max_tokens=tokens, logprobs=None)
        lines = (line for line in connection.getresponse() if line.startswith(b"data:"))
        assert b"choices" in next(lines)
        yield lines


def usage(server) -> list[float]:
    """The share of each replica's pages that are used; a replica that has made no step yet has no such series."""
    return list(metrics(server, "vllm:kv_cache_usage_perc").values())


def test_each_replica_holds_its_part_of_the_kv_and_a_cancel_releases_it(server):
    """The first replica holds 5 blocks and a part of one, the second as many and the output."""
    for seed in range(400, 450):  # on a busy machine the events are late: the output may be complete by then
        assert wait_until(lambda: no_page_is_held(server))
        with streaming(server, random_prompt(seed, 3000), options(2), 600):
            complete_on_rank(server, 1, random_prompt(seed + 10, 20))  # a step, which updates the metric
            if not wait_until(lambda: len([fraction for fraction in usage(server)[:2] if fraction]) == 2, 5):
                continue
            used = [round(fraction * NUM_PAGES) for fraction in usage(server)]
        assert sum(used) < 2960 // PAGE_SIZE + 600 // PAGE_SIZE + 4  # with fetched pages it would be 1.5 times as many
        assert max(used) < 2960 // PAGE_SIZE * 3 // 4
        break
    else:
        pytest.fail("each request was complete before its pages were counted")
    assert wait_until(lambda: no_page_is_held(server))


def processes_of(server, rank: int) -> list[psutil.Process]:
    """The processes of a replica's engine core and its workers."""
    cores = psutil.Process(server.process.pid).children(recursive=True)
    (core,) = (process for process in cores if f"EngineCore_DP{rank}" in " ".join([process.name(), *process.cmdline()]))
    return [core, *core.children(recursive=True)]


def test_requests_with_kv_on_a_replica_that_hangs_fail_and_all_others_run(server):
    """The last test. When the replica runs again, requests are split over it as before."""
    assert wait_until(lambda: no_page_is_held(server))
    prompt, star = random_prompt(50, 4500), options(3)
    expected = complete(server, prompt, star)
    stopped = processes_of(server, 2)  # the replica of the last blocks; the query runs on another one
    last: list[bytes] = []
    for _ in range(50):  # on a busy machine the events are late: the output may be complete by then
        with streaming(server, prompt, star, 600) as lines:
            for process in stopped:
                os.kill(process.pid, signal.SIGSTOP)
            try:
                last = [line for line in lines if b"error" in line]
                for rank in (0, 1):
                    assert len(complete_on_rank(server, rank, random_prompt(51 + rank, 100))[0]) == TOKENS
            finally:
                for process in stopped:
                    os.kill(process.pid, signal.SIGCONT)
        if last:
            break
    assert last and b"holds a part" in last[0], last
    assert wait_until(lambda: no_page_is_held(server))
    assert_same(complete(server, prompt, star), expected)
    assert_equals_reference(server, prompt, star, expected)
