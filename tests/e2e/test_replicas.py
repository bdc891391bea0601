"""One `starling serve` with three data-parallel replicas, over which long prompts are split.

Each output is compared with that of one replica with the same plan. The tests also count the tokens that each replica
computes, so that an output of one replica alone does not pass. The last test kills a replica during a prefill.
"""

import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection

import psutil
import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.exceptions import EngineDeadError

from benchmarks.random_llama import make_tiny_llama
from examples.server import serving
from starling.scheduler.planning.assignment import ReplicaState
from tests.dashboard import OF_COMPRESSED_CACHES, OF_LIBRARIES, QUERIES, metrics_of, samples_of
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
    count_plans,
    expected,
    metrics,
    options,
    post,
    random_prompt,
    send,
)
from tests.e2e.sockets import assert_sockets, documented_sockets, open_sockets
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

CONCURRENT_TOLERANCE = 5e-5  # in float32 the rows of a batch change one another's last bits, with plain vLLM too
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
    "loggers": {"vllm": {"handlers": ["out"], "level": "INFO"}, "vllm.starling": {"level": "DEBUG"}},
}
"""Starling's logger at debug level logs a line for each plan of a prompt."""
TIMEOUT_SECONDS = 30
"""Of a replica that does not answer: only one that hangs takes so long, on a slow machine too."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    options = [*ENGINE_OPTIONS, "--data-parallel-size", str(REPLICAS), "--num-gpu-blocks-override", "800"]
    options += [
        "--max-logprobs",
        "5",
        "--additional-config",
        json.dumps({"starling": {"replicas": {"timeout": TIMEOUT_SECONDS}}}),
    ]
    logging = folder / "logging.json"
    logging.write_text(json.dumps(LOGGING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a machine may have fewer cores than replicas
        # vLLM compiles the ranks of logprobs at their first use: 13 s a replica.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("VLLM_LOGGING_CONFIG_PATH", str(logging))
        with serving(make_tiny_llama(folder / "tiny"), *options, log=folder / "log") as server:
            yield server


@pytest.mark.parametrize(
    ("seed", "length", "star"),
    [
        (1, 2088, options(2)),  # 8 blocks
        (2, 1990, options(2)),  # 8, the last one ends within a page
        (3, 2350, options(2, 256, 40)),  # 10 blocks, the last one of 6 tokens
        (4, 2088, options(3)),
        (5, 3001, options(3, 320, 5)),
    ],
    ids=["2 replicas", "2, ragged", "2, short last block", "3 replicas", "3, ragged"],
)
def test_each_replica_computes_its_part_and_the_output_is_that_of_one_replica(server, seed, length, star):
    prompt = random_prompt(seed, length)
    before, plans = computed(server), count_plans(server)
    output = complete(server, prompt, star)
    assert computed_since(server, before) == expected(length, star, [ReplicaState()] * REPLICAS)
    assert output[2]["replicas"] == star["star_replicas"]
    assert count_plans(server) == plans + 1, "the parts and the whole request use the front's plan"
    assert_same(output, complete_on_one(server, prompt, star))


def test_the_dashboard_has_all_series_of_starling_and_no_query_without_a_series(server):
    complete(server, random_prompt(6, 2088), options(2))
    with pytest.raises(urllib.error.HTTPError):
        complete(server, random_prompt(6, 2088), options(2, block=100))
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=300) as response:
        text = response.read().decode()
    queried = set().union(*map(metrics_of, QUERIES)) - OF_COMPRESSED_CACHES - OF_LIBRARIES
    ours = {name for name in samples_of(text) if name.startswith("starling:")}
    assert ours == {name for name in queried if name.startswith("starling:")}
    # A series of vLLM may have no value yet: the requests that a limit has refused.
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    suffixes = ("", "_bucket", "_sum", "_count")
    assert queried <= ours | {family + suffix for family in families for suffix in suffixes}


def test_a_cached_anchor_and_a_cached_prompt_are_not_computed_again(server):
    star = options(2)
    first, second = random_prompt(10, 2088), random_prompt(11, 2088)
    second[:256] = first[:256]
    complete(server, first, star)
    before = computed(server)
    output = complete(server, second, star)
    cached = ReplicaState(b"\1", has_anchor=True)
    assert computed_since(server, before) == expected(2088, star, [cached, cached, ReplicaState()])
    before = computed(server)
    again = complete(server, second, star)
    assert sum(computed_since(server, before)) <= PAGE_SIZE + TOKENS
    assert_same(again, output)
    assert_same(output, complete_on_one(server, second, star))


def test_only_an_edited_block_is_computed_again(server):
    """All other blocks are cached on the replica that ran the query, also those that it fetched."""
    star, prompt = options(2), random_prompt(12, 2088)
    complete(server, prompt, star)
    prompt[5 * 256 + 100] = 251
    before = computed(server)
    output = complete(server, prompt, star)
    # From the edited page to the block's end, the query and the output.
    assert sum(computed_since(server, before)) == 256 - 96 + 40 + TOKENS - 1
    assert_same(output, complete_on_one(server, prompt, star))


def documents_of(prompt: list[int]) -> dict:
    """The options of a prompt whose documents start with token 256."""
    return {
        "star": "on",
        "star_query_tokens": 40,
        "star_segments": [at for at, token in enumerate(prompt) if token == 256],
    }


def test_an_edit_that_makes_a_document_longer_moves_no_other_document(server):
    documents, query = [[256, *random_prompt(seed, 180 + seed)] for seed in range(60, 68)], random_prompt(68, 40)

    def make_prompt(documents: list[list[int]]) -> list[int]:
        return [token for document in documents for token in document] + query

    prompt, before = make_prompt(documents), computed(server)
    first = complete(server, prompt, documents_of(prompt) | {"star_replicas": 2})
    work = computed_since(server, before)
    assert sum(tokens > 3 * 256 for tokens in work) == 2, work
    documents[4] += random_prompt(69, 9)
    prompt, before = make_prompt(documents), computed(server)
    star = documents_of(prompt) | {"star_replicas": 2}
    output = complete(server, prompt, star)
    assert sum(computed_since(server, before)) < 2 * PAGE_SIZE + 40 + TOKENS
    assert output[2]["prompt_tokens"] == first[2]["prompt_tokens"] + 9 == len(prompt)
    assert_same(output, complete_on_one(server, prompt, star))


DOCUMENT_LENGTHS = (300, 41, 256, 500, 33, 410, 120, 380)


def prompt_of_documents(seed: int, order: int = 1) -> tuple[list[int], int]:
    """A prompt of a head, documents of these lengths and a query, and the tokens that its context takes with padding.

    Args:
        order: -1: the documents stand in reverse.
    """
    head, query = random_prompt(seed, 75), random_prompt(seed + 1, 40)
    lengths = enumerate(DOCUMENT_LENGTHS, seed + 2)
    documents = [[256, *random_prompt(number, length - 1)] for number, length in lengths]
    ids = [token for part in (head, *documents[::order], query) for token in part]
    return ids, sum(-(-len(part) // PAGE_SIZE) * PAGE_SIZE for part in (head, *documents))


@pytest.mark.parametrize("replicas", [2, 3])
def test_documents_with_positions_of_their_own_are_computed_on_several_replicas(server, replicas):
    """Each document once, and all of them are found again in another order."""
    (prompt, context), before = prompt_of_documents(100 * replicas), computed(server)
    star = documents_of(prompt) | {"star_replicas": replicas}
    output = complete(server, prompt, star)
    work, query = computed_since(server, before), star["star_query_tokens"] + TOKENS - 1
    assert output[2]["replicas"] == replicas and output[2]["prompt_tokens"] == len(prompt)
    assert sum(work) == context + (replicas - 1) * 64 + query  # with the anchor once more on each other replica
    assert sum(tokens > 300 for tokens in work) == replicas, work
    assert_same(output, complete_on_one(server, prompt, star))

    (prompt, _), before = prompt_of_documents(100 * replicas, -1), computed(server)
    star |= documents_of(prompt)
    output = complete(server, prompt, star)
    assert sum(computed_since(server, before)) <= 2 * PAGE_SIZE + query
    assert_same(output, complete_on_one(server, prompt, star))


def test_a_dense_request_gets_dense_attention_after_a_star_request_for_the_same_prompt(server):
    prompt, star = random_prompt(20, 2088), options(3)
    split = complete(server, prompt, star)
    dense = complete(server, prompt, {"star": "off"}, cache_salt="another")
    assert max(abs(a - b) for a, b in zip(split[1], dense[1], strict=True)) > 0.01  # or the test would show nothing
    for _ in range(REPLICAS):  # vLLM chooses another replica each time
        assert_same(complete(server, prompt, {"star": "off"}), dense)
    for _ in range(REPLICAS):
        assert_same(complete(server, prompt, star | {"star_replicas": 1}), split)


def test_concurrent_long_and_short_prompts_give_the_same_output_as_alone(server):
    star = options(3)
    long = [random_prompt(seed, 2088 + 64 * (seed % 3)) for seed in (30, 31)]
    short = [random_prompt(seed, 100 + seed) for seed in range(40, 48)]
    before = computed(server)
    with ThreadPoolExecutor(10) as pool:
        futures = [pool.submit(complete, server, prompt, star) for prompt in long]
        futures += [pool.submit(complete, server, prompt, {"star": "off"}) for prompt in short]
        outputs = [future.result() for future in futures]
    work = computed_since(server, before)
    assert all(tokens > 256 for tokens in work), work
    for output, prompt in zip(outputs[:2], long, strict=True):
        assert_same(output, complete_on_one(server, prompt, star), CONCURRENT_TOLERANCE)
    for output, prompt in zip(outputs[2:], short, strict=True):
        assert_same(output, complete(server, prompt, {"star": "off"}, cache_salt="another"), CONCURRENT_TOLERANCE)


def test_a_grpc_request_is_split_over_replicas(server):
    prompt, before = random_prompt(50, 2088), computed(server)
    output = complete_over_grpc(server, prompt, replicas=2)
    assert computed_since(server, before) == expected(2088, options(2), [ReplicaState()] * REPLICAS)
    assert output[2].replicas == 2
    assert_same(output, complete_on_one(server, prompt, options(2)))


def test_parts_are_not_counted_as_requests_and_choices_use_the_same_fetched_pages(server):
    def counts():
        ended = sum(metrics(server, "vllm:request_success_total").values())
        return ended, sum(metrics(server, "vllm:prompt_tokens_total").values())

    before, work = counts(), computed(server)
    with post(server, random_prompt(60, 2088), options(2), n=2, temperature=1.0, seed=1) as response:
        assert len(json.loads(response.read())["choices"]) == 2
    after = counts()
    assert (after[0] - before[0], after[1] - before[1]) == (2, 2 * 2088)  # as vLLM counts two choices
    assert sum(computed_since(server, work)) < 2088 + 256 + 2 * (64 + TOKENS)


@pytest.mark.parametrize(
    ("star", "words"),
    [
        (options(4), ["star_replicas=4", "this server has 3", "auto, or up to 3"]),
        (options(2) | {"star_overlap_size": 32}, ["star_replicas=2", "star_overlap_size=32"]),
        ({"starling": "a part of another prompt"}, ["starling='a part of another prompt' is refused", "reserved"]),
    ],
    ids=["too many", "overlap", "forged"],
)
def test_options_that_this_server_can_not_fulfil_give_400(server, star, words):
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(server, random_prompt(1, 500), star)
    assert refused.value.code == 400
    text = refused.value.read().decode()
    assert all(word in text for word in words), text


def begin(server, seed: int) -> HTTPConnection:
    """Send a long prompt without waiting for its response."""
    connection = connect(server)
    send(connection, server, random_prompt(seed, 8000), options(3, 512))
    return connection


def test_a_cancel_during_a_prefill_leaves_no_page(server):
    cancelled = 0
    # On a busy machine the metrics are late: a prompt may be prefilled before the cancel.
    for seed in range(1000, 1050):
        before = computed(server)
        with closing(begin(server, seed)):
            assert wait_until(lambda before=before: all(computed_since(server, before)))
        assert wait_until(lambda: not any(pages_used(server)))
        cancelled += sum(computed_since(server, before)) < 8000
        if cancelled == 3:
            return
    pytest.fail(f"only {cancelled} of 50 prompts were cancelled during their prefill")


def pages_used(server) -> list[float]:
    """Fraction of each replica's pages. vLLM updates the metric in a step, so each replica gets a short prompt."""
    for seed in range(REPLICAS):
        complete(server, random_prompt(seed, 20))
    return list(metrics(server, "vllm:kv_cache_usage_perc").values())


def descendant(pid: int, title: str) -> psutil.Process:
    """The descendant of a process with ``title`` in its name or command line."""
    (process,) = (
        process
        for process in psutil.Process(pid).children(recursive=True)
        if title in " ".join(process.cmdline()) or title in process.name()
    )
    return process


def test_a_replica_that_hangs_during_its_part_delays_the_output_and_nothing_else(server):
    """The replica's worker is stopped, so that its part does not end. Later the replica gets parts again."""
    prompt, star = random_prompt(79, 2088), options(3)
    alone = complete_on_one(server, prompt, star)
    before = metrics(server, "starling:split_blocks_total")
    worker = descendant(descendant(server.process.pid, "EngineCore_DP1").pid, "Worker")
    worker.suspend()
    try:
        started = time.monotonic()
        assert_same(complete(server, prompt, star), alone)
        assert time.monotonic() - started >= TIMEOUT_SECONDS
        assert metrics(server, "starling:split_blocks_total") == before
        complete(server, random_prompt(78, 2088), star)
        after = metrics(server, "starling:split_blocks_total")
        names = [f'{{replica="{rank}"}}' for rank in range(REPLICAS)]
        used = [after.get(name, 0) > before.get(name, 0) for name in names]
        assert used == [True, False, True], "a replica with an open call gets no other call"
    finally:
        worker.resume()
    assert wait_until(lambda: not any(pages_used(server)))
    earlier, again = computed(server), random_prompt(77, 2088)
    output = complete(server, again, star)
    assert computed_since(server, earlier) == expected(2088, star, [ReplicaState()] * REPLICAS)
    assert_same(output, complete_on_one(server, again, star))


def test_the_sockets_are_those_of_the_documentation(server):
    """A peer that reaches a port of NIXL's can write a worker's memory."""
    assert_sockets(lambda: open_sockets(server.process.pid), documented_sockets("Replicas on one host"))


def test_requests_fail_if_a_replica_is_killed_during_a_prefill(server):
    """The last test: vLLM's data parallelism ends with an error when a replica ends."""
    victim, before = descendant(server.process.pid, "EngineCore_DP1"), computed(server)
    with ExitStack() as stack:  # many prompts, as the metrics are late: some could be prefilled by then
        connections = [stack.enter_context(closing(begin(server, seed))) for seed in range(80, 92)]
        assert wait_until(lambda: computed(server)[1] > before[1])
        victim.kill()
        responses = [(response.status, response.read()) for response in map(HTTPConnection.getresponse, connections)]
    failed = [text for status, text in responses if status >= 500]
    assert failed
    dead = create_error_response(EngineDeadError()).error.message.encode()
    assert all(dead in text for text in failed)
    assert all(len(json.loads(text)["choices"][0]["logprobs"]["tokens"]) == TOKENS for s, text in responses if s < 500)
    assert server.process.wait(300) != 0
