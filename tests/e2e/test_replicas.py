"""One `starling serve` with three data-parallel replicas: long prompts prefilled on several of them at once.

Every answer is held against one replica's with the same plan, and the tokens that each replica computed are counted:
an answer that came from one replica alone is no pass. At last a replica is killed in the middle of a prefill.
"""

import json
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection

import grpc
import psutil
import pytest

from examples.server import end_on_signals, serving
from scheduler.spread import Replica, spread_blocks
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.e2e.models import make_tiny_llama

pytestmark = pytest.mark.e2e

PAGE, TOKENS = 32, 6
TOLERANCE = 1e-5
BESIDE_OTHERS = 5e-5  # in float32 the rows of a batch change one another's last bits, with plain vLLM too
REPLICAS = 3
SILENCE_SECONDS = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    end_on_signals()
    folder = tmp_path_factory.mktemp("replicas")
    options = ["--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager", "--max-num-batched-tokens", "128"]
    options += ["--data-parallel-size", str(REPLICAS), "--num-gpu-blocks-override", "800", "--max-logprobs", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # there may be fewer cores than replicas
        # vLLM compiles the ranks of logprobs at their first use: 13 s a replica.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("STARLING_SILENCE_SECONDS", str(SILENCE_SECONDS))
        with serving(make_tiny_llama(folder / "tiny"), *options, log=folder / "log", seconds=300) as server:
            yield server


def random_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=length)


def body(server, prompt: list[int], star: dict | None, **more) -> dict:
    asked = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    return asked | {"ignore_eos": True, "return_tokens_as_token_ids": True, "vllm_xargs": star or {}} | more


def ask(server, prompt, star=None, **more):
    """(tokens, logprobs, plan) of one completion."""
    data = json.dumps(body(server, prompt, star, **more)).encode()
    request = urllib.request.Request(f"{server.http}/v1/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return answer_of(response)


def answer_of(response):
    plan, choice = json.loads(response.headers["x-starling-plan"]), json.loads(response.read())["choices"][0]
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], plan


def metrics(server, name: str) -> dict[str, float]:
    """Values of a metric by its labels as they are printed."""
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=10) as response:
        lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines()]
    return {labels.removeprefix(name): float(value) for labels, value in lines if labels.split("{")[0] == name}


def computed(server, replicas: int = REPLICAS) -> list[int]:
    """Tokens that each replica has computed so far."""
    counts = metrics(server, "starling:computed_tokens_total")
    return [int(counts[f'{{replica="{replica}"}}']) for replica in range(replicas)]


def expected(length: int, star: dict, states: list[Replica]) -> list[int]:
    """What each replica has to compute: its blocks, the anchor where it lacks it, the query where it is."""
    block, end = star["star_block_size"], (length - star["star_query_tokens"]) // PAGE * PAGE
    blocks = -(-(length - star["star_query_tokens"]) // block)
    runs = spread_blocks(blocks, 1.0, states, star["star_replicas"])
    assert len(runs) > 1
    tokens = [0] * len(states)
    for run in runs:
        state = states[run.replica]
        for index in range(run.first, run.stop):
            tokens[run.replica] += 0 if index in state.cached else min((index + 1) * block, end) - index * block
        if run.first and not state.has_anchor:
            tokens[run.replica] += block
    tokens[runs[0].replica] += length - end + TOKENS - 1
    return tokens


def assert_same(one, other, tolerance: float = TOLERANCE) -> None:
    assert one[0] == other[0]
    assert max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) <= tolerance


def on_one(server, prompt, star):
    """The same plan on one replica, which finds nothing in its cache."""
    answer = ask(server, prompt, star | {"star_replicas": 1}, cache_salt="another")
    assert answer[2]["replicas"] == 1
    return answer


def options(replicas: int, block: int = 256, query: int = 40) -> dict:
    return {"star": "on", "star_block_size": block, "star_query_tokens": query, "star_replicas": replicas}


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
def test_each_replica_computes_its_part_and_the_answer_is_that_of_one(server, seed, length, star):
    prompt = random_prompt(seed, length)
    before = computed(server)
    answer = ask(server, prompt, star)
    work = [after - earlier for after, earlier in zip(computed(server), before, strict=True)]
    assert work == expected(length, star, [Replica()] * REPLICAS)
    assert answer[2]["replicas"] == star["star_replicas"]
    assert_same(answer, on_one(server, prompt, star))


def test_a_cached_anchor_is_not_computed_again_and_a_second_time_nothing_is(server):
    star = options(2)
    first, second = random_prompt(10, 2088), random_prompt(11, 2088)
    second[:256] = first[:256]
    ask(server, first, star)
    before = computed(server)
    answer = ask(server, second, star)
    middle = computed(server)
    holder = Replica(frozenset({0}), has_anchor=True)
    states = [holder, holder, Replica()]
    assert [b - a for a, b in zip(before, middle, strict=True)] == expected(2088, star, states)
    again = ask(server, second, star)
    assert sum(computed(server)) - sum(middle) <= PAGE + TOKENS
    assert_same(again, answer)
    assert_same(answer, on_one(server, second, star))


def test_an_edited_block_alone_is_computed_again(server):
    """Where the query ran, every other block is in the cache, those that came from the other replica too."""
    star, prompt = options(2), random_prompt(12, 2088)
    ask(server, prompt, star)
    prompt[5 * 256 + 100] = 251
    before = sum(computed(server))
    answer = ask(server, prompt, star)
    assert sum(computed(server)) - before == 256 - 96 + 40 + TOKENS - 1  # from the edited page to the block's end
    assert_same(answer, on_one(server, prompt, star))


def test_a_segment_that_gets_longer_moves_no_other(server):
    star = options(2) | {"star_segment_token": 256, "star_padding_token": 10}
    segments, query = [[256, *random_prompt(seed, 180 + seed)] for seed in range(60, 68)], random_prompt(68, 40)

    def whole(segments: list[list[int]]) -> list[int]:
        return [token for segment in segments for token in segment] + query

    before = computed(server)
    first = ask(server, whole(segments), star)
    work = [after - earlier for after, earlier in zip(computed(server), before, strict=True)]
    assert sum(tokens > 3 * 256 for tokens in work) == 2, work
    segments[4] += random_prompt(69, 9)
    before = sum(computed(server))
    answer = ask(server, whole(segments), star)
    assert sum(computed(server)) - before < 2 * PAGE + 40 + TOKENS
    assert answer[2]["prompt_tokens"] == first[2]["prompt_tokens"] == 7 * 256 + len(segments[-1]) + 40
    padded = [segment + [10] * (256 - len(segment)) for segment in segments[:-1]] + segments[-1:]
    assert_same(answer, on_one(server, whole(padded), options(2)))


def test_afterwards_the_same_prompt_is_dense_where_dense_is_asked_for(server):
    prompt, star = random_prompt(20, 2088), options(3)
    spread = ask(server, prompt, star)
    dense = ask(server, prompt, {"star": "off"}, cache_salt="another")
    assert max(abs(a - b) for a, b in zip(spread[1], dense[1], strict=True)) > 0.01  # or this would show nothing
    for _ in range(REPLICAS):  # vLLM takes another replica each time
        assert_same(ask(server, prompt, {"star": "off"}), dense)
    for _ in range(REPLICAS):
        assert_same(ask(server, prompt, star | {"star_replicas": 1}), spread)


def test_long_prompts_at_once_beside_short_ones(server):
    star = options(3)
    long = [random_prompt(seed, 2088 + 64 * (seed % 3)) for seed in (30, 31)]
    short = [random_prompt(seed, 100 + seed) for seed in range(40, 48)]
    before = computed(server)
    with ThreadPoolExecutor(10) as pool:
        together = [pool.submit(ask, server, prompt, star) for prompt in long]
        beside = [pool.submit(ask, server, prompt, {"star": "off"}) for prompt in short]
        answers = [asked.result() for asked in (*together, *beside)]
    work = [after - earlier for after, earlier in zip(computed(server), before, strict=True)]
    assert all(tokens > 256 for tokens in work), work
    for answer, prompt in zip(answers[:2], long, strict=True):
        assert_same(answer, on_one(server, prompt, star), BESIDE_OTHERS)
    for answer, prompt in zip(answers[2:], short, strict=True):
        assert_same(answer, ask(server, prompt, {"star": "off"}, cache_salt="another"), BESIDE_OTHERS)


def test_over_grpc(server):
    prompt = random_prompt(50, 2088)
    star = pb.StarOptions(mode=pb.StarOptions.MODE_ON, block_size=256, query_tokens=40, replicas=2)
    asked = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        star=star,
        sampling=pb.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, n=1, logprobs=0),
    )
    before = computed(server)
    with grpc.insecure_channel(server.grpc) as channel:
        reply = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked, timeout=60)
    assert [b - a for a, b in zip(before, computed(server), strict=True)] == expected(
        2088, options(2), [Replica()] * REPLICAS
    )
    assert reply.plan.replicas == 2
    tokens, logprobs, _ = on_one(server, prompt, options(2))
    assert [f"token_id:{token}" for token in reply.choices[0].token_ids] == tokens
    told = [position.chosen.logprob for position in reply.choices[0].logprobs]
    assert max(abs(a - b) for a, b in zip(told, logprobs, strict=True)) <= TOLERANCE


def test_parts_are_no_requests_of_users_and_choices_share_what_was_fetched(server):
    def counts():
        ended = sum(metrics(server, "vllm:request_success_total").values())
        return ended, sum(metrics(server, "vllm:prompt_tokens_total").values())

    before, work = counts(), sum(computed(server))
    data = body(server, random_prompt(60, 2088), options(2), n=2, temperature=1.0, seed=1)
    request = urllib.request.Request(
        f"{server.http}/v1/completions", json.dumps(data).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert len(json.loads(response.read())["choices"]) == 2
    after = counts()
    assert (after[0] - before[0], after[1] - before[1]) == (2, 2 * 2088)  # as vLLM counts two choices
    assert sum(computed(server)) - work < 2088 + 256 + 2 * (64 + TOKENS)


@pytest.mark.parametrize(
    ("star", "words"),
    [
        (options(4), ["star_replicas=4", "this server has 3", "auto, or 1 to 3"]),
        (options(2) | {"star_overlap_size": 32}, ["star_replicas=2", "star_overlap_size=32"]),
        ({"starling_share": {"Part": {"name": "mine", "start": 0, "anchor": 0}}}, ["starling_share"]),
    ],
    ids=["too many", "overlap", "forged"],
)
def test_what_can_not_be_had_is_a_400(server, star, words):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, random_prompt(1, 500), star)
    assert refused.value.code == 400
    text = refused.value.read().decode()
    assert all(word in text for word in words), text


def begin(server, seed: int) -> HTTPConnection:
    """Send a long prompt and do not wait for its answer."""
    connection = HTTPConnection("127.0.0.1", int(server.http.rsplit(":", 1)[1]), timeout=60)
    data = json.dumps(body(server, random_prompt(seed, 8000), options(3, 512)))
    connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
    return connection


def until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_cancel_in_the_middle_leaves_no_page(server):
    in_the_middle = 0
    for seed in range(70, 80):  # what was computed is told late on a busy machine: a prompt may be done before
        before = computed(server)
        with closing(begin(server, seed)):
            assert until(lambda before=before: all(b > a for a, b in zip(before, computed(server), strict=True)), 20)
        assert until(lambda: not any(pages_used(server)), 20)
        in_the_middle += sum(computed(server)) - sum(before) < 8000
        if in_the_middle == 3:
            return
    pytest.fail(f"only {in_the_middle} of 10 prompts were cancelled before they were done")


def pages_used(server) -> list[float]:
    """Of each replica. vLLM tells it at a step: a short prompt on each one is one."""
    for seed in range(REPLICAS):
        ask(server, random_prompt(seed, 20))
    return list(metrics(server, "vllm:kv_cache_usage_perc").values())


def descendant(pid: int, title: str) -> psutil.Process:
    """The one with this in its title."""
    (process,) = (
        process
        for process in psutil.Process(pid).children(recursive=True)
        if title in " ".join(process.cmdline()) or title in process.name()
    )
    return process


def test_a_replica_that_stalls_at_its_part_costs_time_and_no_answer(server):
    """Its worker is stopped, so that it takes its part and does not end it; once it goes on it gets parts again."""
    prompt, star = random_prompt(79, 2088), options(3)
    alone = on_one(server, prompt, star)
    before = metrics(server, "starling:spread_blocks_total")
    worker = descendant(descendant(server.process.pid, "EngineCore_DP1").pid, "Worker")
    worker.suspend()
    try:
        started = time.monotonic()
        assert_same(ask(server, prompt, star), alone)
        assert SILENCE_SECONDS <= time.monotonic() - started < SILENCE_SECONDS + 20
        assert metrics(server, "starling:spread_blocks_total") == before
        started = time.monotonic()
        ask(server, random_prompt(78, 2088), star)
        assert time.monotonic() - started < SILENCE_SECONDS, "the question it has left open is not asked again"
    finally:
        worker.resume()
    assert until(lambda: not any(pages_used(server)), 20)
    earlier, again = computed(server), random_prompt(77, 2088)
    answer = ask(server, again, star)
    work = [after - count for after, count in zip(computed(server), earlier, strict=True)]
    assert work == expected(2088, star, [Replica()] * REPLICAS)
    assert_same(answer, on_one(server, again, star))


def test_a_killed_replica_in_the_middle_of_a_prefill_is_told_at_once(server):
    """The last test: vLLM's data parallelism does not outlive a replica, and says so."""
    victim, before = descendant(server.process.pid, "EngineCore_DP1"), computed(server)
    with ExitStack() as stack:  # several, for what was computed is told late: one prompt could be done by then
        connections = [stack.enter_context(closing(begin(server, seed))) for seed in range(80, 84)]
        assert until(lambda: computed(server)[1] > before[1], 20)
        victim.kill()
        started = time.monotonic()
        answers = [(response.status, response.read()) for response in map(HTTPConnection.getresponse, connections)]
        assert time.monotonic() - started < 20
    refused = [text for status, text in answers if status >= 500]
    assert refused
    assert all(b"EngineCore" in text for text in refused)
    assert all(len(json.loads(text)["choices"][0]["logprobs"]["tokens"]) == TOKENS for s, text in answers if s < 500)
    assert server.process.wait(30) != 0
