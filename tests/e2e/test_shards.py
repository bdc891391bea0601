"""One `starling serve` with three data-parallel replicas whose prompts leave their KV where it was made.

Answers are held against one replica's with the same plan, and where a prompt exceeds that one's memory, against
Transformers under the explicit mask. Each test counts what went between the replicas: an answer that came from one
replica alone, or from pages that were moved, is no pass. At last a replica that holds KV is stopped.
"""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import grpc
import psutil
import pytest

from examples.server import end_on_signals, serving
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.e2e.models import make_tiny_llama
from tests.e2e.test_replicas import (
    BESIDE_OTHERS,
    REPLICAS,
    ask,
    assert_same,
    body,
    computed,
    metrics,
    on_one,
    options,
    random_prompt,
    until,
)
from tests.parity.harness import mask_of, reference_logprobs

pytestmark = pytest.mark.e2e

PAGE, TOKENS, LAYERS, HEADS, HIDDEN = 32, 6, 2, 2, 64
PAGES = 99
"""Of each replica: 3,168 tokens."""

BYTES = LAYERS * (2 * HIDDEN + HEADS) * 4
"""Of a query token, its partial output and the log-sum-exp of each head, in float32."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    end_on_signals()
    folder = tmp_path_factory.mktemp("shards")
    arguments = ["--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager", "--max-num-batched-tokens", "128"]
    arguments += ["--data-parallel-size", str(REPLICAS), "--num-gpu-blocks-override", str(PAGES + 1)]
    arguments += ["--star-shards", "on", "--max-logprobs", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # there may be fewer cores than replicas
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs at their first use
        model = make_tiny_llama(folder / "tiny")
        with serving(model, *arguments, log=folder / "log", seconds=300) as server:
            yield server


def moved(server) -> tuple[float, float]:
    """Bytes of pages, and of queries and partial results, that went between replicas so far."""
    names = ("starling:bytes_moved_total", "starling:shard_bytes_total")
    pages, shards = (sum(metrics(server, name).values()) for name in names)
    return pages, shards


def asked_bytes(length: int, star: dict, tokens: int = TOKENS) -> int:
    """What a prompt over all the replicas it may have sends: the query and the output to each of the others, and what
    the context has beyond its last whole page to the one that has the rest of its block."""
    end = length - star["star_query_tokens"]
    tail = end % PAGE if end % star["star_block_size"] >= PAGE else 0
    return BYTES * (tail + (length - end + tokens - 1) * (star["star_replicas"] - 1))


def no_page_is_held(server) -> bool:
    """vLLM tells what a replica uses at a step: a short prompt on each one is one."""
    for rank in range(REPLICAS):
        ask_rank(server, rank, random_prompt(rank, 20))
    return not any(metrics(server, "vllm:kv_cache_usage_perc").values())


def ask_rank(server, rank: int, prompt: list[int], star: dict | None = None):
    """(tokens, logprobs) of a completion on a replica of our choice."""
    data = json.dumps(body(server, prompt, star or {"star": "off"})).encode()
    headers = {"content-type": "application/json", "x-data-parallel-rank": str(rank)}
    request = urllib.request.Request(f"{server.http}/v1/completions", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.loads(response.read())["choices"][0]
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]


def assert_is_the_references(server, prompt: list[int], star: dict, answer) -> None:
    """Tokens and log probabilities against Transformers under the mask written out."""
    ids = prompt + [int(token.removeprefix("token_id:")) for token in answer[0]]
    numbers = {"block_size": star["star_block_size"], "anchor_size": star["star_block_size"], "overlap_size": 0}
    mask = mask_of(numbers | {"context_end": len(prompt) - star["star_query_tokens"]}, len(ids))
    wanted = reference_logprobs(server.model, ids, mask)[-TOKENS:].tolist()
    assert max(abs(a - b) for a, b in zip(answer[1], wanted, strict=True)) <= 1e-4


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
def test_no_page_moves_and_the_answer_is_that_of_one_replica(server, seed, length, star):
    prompt, before = random_prompt(seed, length), moved(server)
    answer = ask(server, prompt, star)
    after = moved(server)
    assert after[0] == before[0]
    assert after[1] - before[1] == asked_bytes(length, star)
    assert (answer[2]["replicas"], answer[2]["shards"]) == (star["star_replicas"], True)
    assert_same(answer, on_one(server, prompt, star))


def test_a_prompt_that_exceeds_one_replicas_memory(server):
    star, prompt, before = options(3), random_prompt(10, 4500), moved(server)
    answer = ask(server, prompt, star)
    assert moved(server) == (before[0], before[1] + asked_bytes(4500, star))
    assert_is_the_references(server, prompt, star, answer)
    again = computed(server)
    assert_same(ask(server, prompt, star), answer)
    assert sum(computed(server)) - sum(again) < 4500 / 4  # each has its run in the prefix cache


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
def test_what_fits_nowhere_or_can_not_be_is_a_400(server, length, star, words):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, random_prompt(1, length), star)
    text = refused.value.read().decode()
    assert refused.value.code == 400 and all(word in text for word in words), text


def test_a_dense_output_ends_where_the_memory_does(server):
    tokens, _, _ = ask(server, random_prompt(11, 3100), {"star": "off"}, max_tokens=500)
    assert len(tokens) == PAGES * PAGE - 3100


def test_two_that_exceed_one_replica_at_once_beside_short_and_dense_ones(server):
    star, before = options(3), moved(server)
    long = [random_prompt(seed, length) for seed, length in ((20, 4500), (21, 4300))]
    others = [
        (random_prompt(22, 1500), options(2)),
        *((random_prompt(seed, 90 + seed), None) for seed in range(23, 29)),
    ]
    with ThreadPoolExecutor(9) as pool:
        both = [pool.submit(ask, server, prompt, star) for prompt in long]
        beside = [pool.submit(ask, server, prompt, other or {"star": "off"}) for prompt, other in others]
        answers, rest = [asked.result() for asked in both], [asked.result() for asked in beside]
    assert moved(server)[0] == before[0]
    assert moved(server)[1] - before[1] >= sum(asked_bytes(len(prompt), star) for prompt in long)
    for prompt, answer in zip(long, answers, strict=True):
        assert_is_the_references(server, prompt, star, answer)
    assert_same(rest[0], on_one(server, *others[0]), BESIDE_OTHERS)
    for (prompt, _), answer in zip(others[1:], rest[1:], strict=True):
        assert_same(answer, ask(server, prompt, {"star": "off"}, cache_salt="another"), BESIDE_OTHERS)
    assert until(lambda: no_page_is_held(server), 20)


def test_what_it_leaves_in_the_caches_serves_every_other_kind_of_request(server):
    prompt, star = random_prompt(30, 2088), options(3)
    shards = ask(server, prompt, star)
    dense = ask(server, prompt, {"star": "off"}, cache_salt="another")
    assert max(abs(a - b) for a, b in zip(shards[1], dense[1], strict=True)) > 0.01  # or this would show nothing
    for rank in range(REPLICAS):
        assert_same(ask_rank(server, rank, prompt), dense)
    before = moved(server)
    assert_same(ask(server, prompt, star | {"star_shards": "off"}), shards)
    assert moved(server)[0] > before[0] and moved(server)[1] == before[1]  # fetched now
    for rank in range(REPLICAS):
        assert_same(ask_rank(server, rank, prompt, star | {"star_replicas": 1}), shards)


def test_two_choices_attend_each_for_itself(server):
    prompt, star, before = random_prompt(32, 2088), options(2), moved(server)
    asked = {"n": 2, "temperature": 1, "seed": 1, "logprobs": 1}

    def texts(star: dict, **more) -> list[list[str]]:
        data = json.dumps(body(server, prompt, star, **asked, **more)).encode()
        request = urllib.request.Request(f"{server.http}/v1/completions", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return [choice["logprobs"]["tokens"] for choice in json.loads(response.read())["choices"]]

    assert texts(star) == texts(star | {"star_replicas": 1}, cache_salt="another")
    # The second one finds the query's whole pages in the cache, or runs in the same step.
    assert asked_bytes(2088, star) + BYTES * (TOKENS - 1) < moved(server)[1] - before[1] <= 2 * asked_bytes(2088, star)


def test_over_grpc(server):
    prompt, star = random_prompt(31, 2088), options(2)
    before = moved(server)
    tokens, logprobs, _ = on_one(server, prompt, star)
    asked = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        star=pb.StarOptions(mode=pb.StarOptions.MODE_ON, block_size=256, query_tokens=40, replicas=2, shards=True),
        sampling=pb.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, n=1, logprobs=0),
    )
    with grpc.insecure_channel(server.grpc) as channel:
        reply = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked, timeout=60)
    (choice,) = reply.choices
    assert reply.plan.shards and [f"token_id:{token}" for token in choice.token_ids] == tokens
    told = [position.chosen.logprob for position in choice.logprobs]
    assert_same((tokens, told), (tokens, logprobs))
    assert moved(server)[1] - before[1] == asked_bytes(2088, star)


@contextmanager
def streaming(server, prompt: list[int], star: dict, tokens: int):
    """A response that has begun, as (connection, its lines)."""
    connection = HTTPConnection("127.0.0.1", int(server.http.rsplit(":", 1)[1]), timeout=90)
    data = json.dumps(body(server, prompt, star, stream=True, max_tokens=tokens, logprobs=None))
    with closing(connection):
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        response = connection.getresponse()
        lines = (line for line in response if line.startswith(b"data:"))
        assert b"choices" in next(lines)
        yield connection, lines


def test_each_replica_holds_its_share_and_a_cancel_leaves_no_page(server):
    """5 blocks and a part of one on the first, as many on the second, and what is generated."""
    for seed in range(40, 45):  # tokens are told late on a busy machine: the output may be complete by then
        assert until(lambda: no_page_is_held(server), 20)
        with streaming(server, random_prompt(seed, 3000), options(2), 600):
            ask_rank(server, 1, random_prompt(seed + 10, 20))  # a step: what the holder has is told
            if not until(lambda: all(list(metrics(server, "vllm:kv_cache_usage_perc").values())[:2]), 5):
                continue
            used = [round(share * PAGES) for share in metrics(server, "vllm:kv_cache_usage_perc").values()]
        assert sum(used) < 2960 // PAGE + 600 // PAGE + 4  # with pages fetched it would be half as much again
        assert max(used) < 2960 // PAGE * 3 // 4
        break
    else:
        pytest.fail("no request was seen before it was done")
    assert until(lambda: no_page_is_held(server), 20)


def processes_of(server, rank: int) -> list[psutil.Process]:
    """A replica's engine core and its workers."""
    cores = psutil.Process(server.process.pid).children(recursive=True)
    (core,) = (process for process in cores if f"EngineCore_DP{rank}" in " ".join([process.name(), *process.cmdline()]))
    return [core, *core.children(recursive=True)]


def test_a_holder_that_hangs_costs_its_requests_and_nobody_else(server):
    """The last test. What is under way there ends with an error; when it is back, all is as before."""
    assert until(lambda: no_page_is_held(server), 20)
    prompt, star = random_prompt(50, 4500), options(3)
    wanted = ask(server, prompt, star)
    stopped = processes_of(server, 2)  # the last run's: the query is elsewhere
    last: list[bytes] = []
    for _ in range(5):  # tokens are told late on a busy machine: the output may be complete by then
        with streaming(server, prompt, star, 600) as (_, lines):
            for process in stopped:
                os.kill(process.pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                last = [line for line in lines if b"error" in line]
                assert time.monotonic() - started < 30
                for rank in (0, 1):
                    assert len(ask_rank(server, rank, random_prompt(51 + rank, 100))[0]) == TOKENS
            finally:
                for process in stopped:
                    os.kill(process.pid, signal.SIGCONT)
        if last:
            break
    assert last and b"holds a part" in last[0], last
    assert until(lambda: no_page_is_held(server), 60)
    assert_same(ask(server, prompt, star), wanted)
    assert_is_the_references(server, prompt, star, wanted)
