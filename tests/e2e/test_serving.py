"""One `starling serve` process with clients of HTTP and gRPC: outputs, plans, refusals, metrics, shutdown."""

import json
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from itertools import chain

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.random_llama import SPECIAL
from starling.v1 import inference_pb2 as pb
from tests.e2e.refused import BAD, BAD_FIELDS, BAD_OVER_GRPC, BAD_SEGMENTS, refused_fields
from tests.e2e.serving import (
    DENSE_KEYS,
    LONG,
    MODEL,
    NUMBERS,
    PAGE_SIZE,
    PATHS,
    PROMPT,
    STAR,
    body,
    example,
    metrics,
    options,
    read,
    request,
    running,
)
from tests.e2e.sockets import assert_sockets, documented_sockets, open_sockets
from tests.e2e.wait import wait_until

pytestmark = pytest.mark.e2e


def test_the_sockets_are_those_of_the_documentation(server):
    assert_sockets(lambda: open_sockets(server.process.pid), documented_sockets("One engine"))


def test_there_is_no_live_page_by_default(http):
    assert [http.get(f"/starling/{name}").status_code for name in ("live", "live.json")] == [404, 404]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_http_responses_have_the_plan(http, path, stream):
    with http.stream("POST", path, json=body(path, stream=stream, xargs=STAR)) as response:
        response.read()
    assert response.status_code == 200, response.text
    plan = json.loads(response.headers["x-starling-plan"])
    prompt_tokens = plan["prompt_tokens"]  # a chat template adds tokens
    assert prompt_tokens >= 701
    expected = NUMBERS | {"prompt_tokens": prompt_tokens, "context_end": prompt_tokens - 40}
    assert {name: plan[name] for name in NUMBERS} == expected
    assert plan["attention"] == "star"
    assert plan["keys_attended"] < plan["dense_keys"] == prompt_tokens * (prompt_tokens + 1) // 2


def test_http_responses_of_dense_requests_have_a_dense_plan(http):
    response = http.post("/v1/completions", json=body("/v1/completions"))
    assert json.loads(response.headers["x-starling-plan"]) == {
        "attention": "dense",
        "prompt_tokens": 701,
        "why": "star is off",
    }


@pytest.mark.parametrize("star", [None, STAR], ids=["dense", "star"])
def test_grpc_gives_the_output_of_http(http, generate, star):
    path = "/v1/completions"
    response = http.post(path, json=body(path, xargs=star, ignore_eos=True, return_token_ids=True)).json()
    choice = response["choices"][0]
    text, tokens, final = read(generate(request(star and options(star))))
    assert tokens == choice["token_ids"]
    assert text == choice["text"]
    assert final.finish_reason == pb.Final.FINISH_REASON_LENGTH
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == (701, 16)
    if star is None:
        assert final.plan.attention == pb.Plan.ATTENTION_DENSE
        assert final.plan.keys_attended == final.plan.dense_keys == DENSE_KEYS
    else:
        assert final.plan.attention == pb.Plan.ATTENTION_STAR
        assert {name: getattr(final.plan, name) for name in NUMBERS} == NUMBERS
        assert final.plan.keys_attended < final.plan.dense_keys == DENSE_KEYS


def test_star_and_dense_outputs_differ(generate):
    dense, star = (read(generate(request(chosen)))[1] for chosen in (None, options(STAR)))
    assert dense != star


def test_text_and_its_token_ids_give_the_same_output(http, generate):
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": PROMPT}).json()["tokens"]
    ids = pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=tokens), sampling=request().sampling)
    assert read(generate(ids))[:2] == read(generate(request()))[:2]


def test_deltas_add_up_to_the_whole_output(http, generate):
    """A stop string makes vLLM hold back text, and some bytes are no character alone."""
    # The prompt fits one step: a seed with a prompt in chunks ends vLLM 0.32's engine on CPU (V1 runner).
    prompt = PROMPT[:300]
    sampling = pb.SamplingParams(temperature=1.5, seed=5, max_tokens=200, ignore_eos=True, stop=["\x02", "qz"])
    text, tokens, final = read(generate(request(text=prompt, sampling=sampling)))
    fields = {
        "temperature": 1.5,
        "seed": 5,
        "max_tokens": 200,
        "ignore_eos": True,
        "stop": ["\x02", "qz"],
        "prompt": prompt,
    }
    path = "/v1/completions"
    choice = http.post(path, json=body(path, return_token_ids=True, **fields)).json()["choices"][0]
    assert (text, tokens) == (choice["text"], choice["token_ids"])
    assert final.usage.completion_tokens == len(tokens)
    assert (final.stop_string or None) == choice["stop_reason"]


def test_usage_counts_cached_tokens(generate):
    salted = request(cache_salt="test-cached")
    assert read(generate(salted))[2].usage.cached_tokens == 0
    assert read(generate(salted))[2].usage.cached_tokens == 701 // PAGE_SIZE * PAGE_SIZE
    assert read(generate(request(cache_salt="another")))[2].usage.cached_tokens == 0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_a_bad_option_gives_400(http, path, stream, bad):
    xargs, words = BAD[bad]
    response = http.post(path, json=body(path, stream=stream, xargs=xargs))
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("bad", BAD_OVER_GRPC)
def test_a_bad_option_gives_invalid_argument(generate, bad):
    xargs, words = BAD[bad]
    with pytest.raises(grpc.RpcError) as refused:
        read(generate(request(options(xargs))))
    assert all(word in refused.value.details() for word in words)
    assert refused_fields(refused.value) == [words[0].replace("_", ".", 1)]


@pytest.mark.parametrize("bad", BAD_SEGMENTS)
def test_segments_that_can_not_be_used_give_invalid_argument(generate, bad):
    fields, field, words = BAD_SEGMENTS[bad]
    star = pb.StarOptions(mode=pb.StarOptions.MODE_ON, **fields)
    with pytest.raises(grpc.RpcError) as refused:
        read(generate(request(star)))
    assert words in refused.value.details()
    assert refused_fields(refused.value) == [field]


@pytest.mark.parametrize(("fields", "field"), BAD_FIELDS, ids=lambda value: value if isinstance(value, str) else "")
def test_other_bad_input_gives_invalid_argument(generate, fields, field):
    with pytest.raises(grpc.RpcError) as refused:
        read(generate(request(**fields)))
    assert refused_fields(refused.value) == [field]


def test_the_server_works_after_bad_requests(http, generate):
    assert http.post("/v1/completions", json=body("/v1/completions", xargs=STAR)).status_code == 200
    assert len(read(generate(request(options(STAR))))[1]) == 16


def test_a_cancel_frees_the_request(http, generate):
    generated = metrics(http, "vllm:generation_tokens_total")
    call = generate(request(sampling=LONG, request_id="long"))
    next(call)
    assert wait_until(lambda: running(http) == 1), "the request does not run"
    with pytest.raises(grpc.RpcError) as refused:
        next(generate(request(request_id="long")))
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    call.cancel()
    assert wait_until(lambda: running(http) == 0), "a cancelled request still runs"
    assert metrics(http, "vllm:generation_tokens_total") - generated < LONG.max_tokens
    assert len(read(generate(request(request_id="long")))[1]) == 16


def test_the_request_of_a_killed_client_is_freed(server, http):
    code = (
        "import sys, grpc; from starling.v1 import inference_pb2 as pb, inference_pb2_grpc as stubs\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "stub = stubs.InferenceServiceStub(channel)\n"
        "sampling = pb.SamplingParams(max_tokens=7000, ignore_eos=True)\n"
        "for _ in stub.GenerateStream(pb.GenerateStreamRequest(text='abc', sampling=sampling)): pass\n"
    )
    generated = metrics(http, "vllm:generation_tokens_total")
    client = subprocess.Popen([sys.executable, "-c", code, server.grpc])
    try:
        assert wait_until(lambda: running(http) == 1), "the request does not run"
    finally:
        client.kill()
        client.wait()
    assert wait_until(lambda: running(http) == 0), "the request of a killed client still runs"
    assert metrics(http, "vllm:generation_tokens_total") - generated < LONG.max_tokens


def test_the_grpc_example_prints_the_plan(server, generate):
    printed = example("grpc_stream.py", PROMPT, "--address", server.grpc, "--star-block-size", "128")
    assert "attention='star'" in printed
    assert "block_size=128" in printed


def test_the_openai_example_prints_the_plan(server):
    printed = example("openai_client.py", PROMPT, "--url", server.http, "--star-block-size", "128")
    plan = json.loads(re.search(r"x-starling-plan: (.*)", printed)[1])
    assert (plan["attention"], plan["block_size"]) == ("star", 128)


def test_the_edit_example_computes_one_document(server, http):
    documents = ("--documents", "6", "--characters", "90", "--mark", SPECIAL)
    arguments = (*documents, "--edit", "3", "--turns", "1")
    first, second = example("edit_document.py", "--url", server.http, *arguments).splitlines()
    tokens, longer = (int(re.search(r"of (\d+) prompt tokens", line)[1]) for line in (first, second))
    assert int(re.search(r"(\d+) of", first)[1]) < 128
    assert longer == tokens + len("# Edited in turn 1.\n") > 5 * 128
    # Only the edited document's last page and the question are computed: nothing has moved.
    assert longer - int(re.search(r"(\d+) of", second)[1]) < 2 * PAGE_SIZE + len("\n\nWhat are these files about?\n")
    text = http.get("/metrics").text
    assert float(re.search(r'^starling:cached_tokens_total\{kind="block"\} (\S+)$', text, re.MULTILINE)[1]) >= 2 * 128


def test_the_agent_example_computes_what_has_changed(server):
    sizes = ("--turns", "9", "--files", "6", "--characters", "300", "--block", "128", "--mark", SPECIAL)
    printed = example("agent_session.py", "--url", server.http, *sizes)
    row = re.compile(r"^ *\d+ (.{31}) *(\d+) tokens +(\d+) +\S+ s +(\d+) +\S+ s +(\d+) +\S+ s$", re.MULTILINE)
    turns = [(event.strip(), *map(int, numbers)) for event, *numbers in row.findall(printed)]
    assert len(turns) == 9
    (_, prompt_tokens, *first), (event, *_, edited) = turns[0], turns[2]
    assert (first, event) == ([prompt_tokens] * 3, "a file is edited")
    # The file with the line of the edit, the last turn's messages, and the new question, in whole pages.
    line, messages, question = len("\n# Edited in turn 3.\n"), 200, 120
    assert edited <= 300 + line + messages + question + 2 * PAGE_SIZE
    dense, _, block = (sum(turn[column] for turn in turns) for column in (2, 3, 4))
    assert block < dense
    assert re.search(rf"all turns .* {dense} .* {block} ", printed)
    assert int(re.search(r"anchor .*: (\d+) tokens", printed)[1]) >= PAGE_SIZE


def test_the_retrieval_example_reuses_documents(server):
    sizes = ("--questions", "3", "--documents", "6", "--characters", "600", "--mark", SPECIAL)
    printed = example("rag.py", "--url", server.http, *sizes)
    rows = re.findall(r"^  (dense|block) +(\d+) of (\d+) tokens, .* s ([+-])", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["dense", "block"] * 3
    computed, prompt_tokens = ([int(row[column]) for row in rows] for column in (1, 2))
    assert computed[:2] == prompt_tokens[:2]
    dense, block = sum(computed[0::2]), sum(computed[1::2])
    assert block < 0.8 * dense
    right = sum(row[3] == "+" for row in rows[1::2])
    assert re.fullmatch(rf"block +{block} of \d+ tokens, .* s, {right} of 3 right", printed.splitlines()[-1])


IGNORED = {
    "star": "on",
    "star_block_size": 64,
    "extra_args": {},
    "extra_body": {"vllm_xargs": {"star": "on"}},
    "sampling_params": {"star": "on"},
    "starling": {"star": "on"},
    "vllm_xarg": {"star": "on"},
}


@pytest.mark.parametrize("field", IGNORED)
@pytest.mark.parametrize("path", PATHS)
def test_an_option_that_vllm_would_ignore_gives_400(http, path, field):
    """At the top level of the request's JSON."""
    response = http.post(path, json=body(path) | {field: IGNORED[field]})
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert field in message and "vllm_xargs" in message


def test_documents_with_positions_of_their_own_are_reused_in_another_order(http, generate):
    """Over both fronts, usage and log-probabilities count the prompt as it was sent; only the question is computed."""
    head, question = [70] * (PAGE_SIZE + 6), [68] * 9
    documents = [[256, *[token] * size] for token, size in ((65, 70), (66, 40), (67, 100))]
    prompts = [[*head, *chain.from_iterable(documents[::step]), *question] for step in (1, -1)]
    pages = [-(-len(part) // PAGE_SIZE) for part in (head, *documents)]

    def starts(prompt: list[int]) -> list[int]:
        return [at for at, token in enumerate(prompt) if token == 256]

    def complete(prompt: list[int], salt: str) -> tuple[dict, dict, dict]:
        star = {"star": "on", "star_segments": starts(prompt), "star_query_tokens": len(question)}
        fields = {"model": MODEL, "max_tokens": 4, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1, "echo": True}
        fields |= {"prompt": prompt, "vllm_xargs": star, "cache_salt": salt}
        response = http.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0], json.loads(response.headers["x-starling-plan"]), response.json()["usage"]

    for prompt in prompts:
        choice, plan, usage = complete(prompt, "own positions")
        assert usage["prompt_tokens"] == plan["prompt_tokens"] == len(prompt) == len(choice["prompt_logprobs"])
        assert (plan["documents"], plan["star_blocks"], plan["anchor_size"]) == (True, 4, PAGE_SIZE)
        assert plan["padding_tokens"] == sum(pages) * PAGE_SIZE - (len(prompt) - len(question))

    answers, cached = [], []
    for prompt in prompts:
        for salt in ("own positions over grpc", f"cold {len(answers)}"):
            options = pb.StarOptions(
                mode=pb.StarOptions.MODE_ON, segment_offsets=starts(prompt), query_tokens=len(question)
            )
            tokens = pb.TokenIds(ids=prompt)
            _, tokens, final = read(generate(request(options, text=None, token_ids=tokens, cache_salt=salt)))
            assert final.usage.prompt_tokens == len(prompt)
            assert final.plan.documents
            answers.append(tokens)
            cached.append(final.usage.cached_tokens)
    assert cached == [0, 0, len(prompts[1]) - len(question), 0]
    assert answers[0] == answers[1] and answers[2] == answers[3]


def test_messages_of_a_chat_are_reused_in_another_order(http, generate):
    """With star_segments=auto over HTTP, and over gRPC, only the question is computed, and the answers are equal."""
    head = {"role": "system", "content": "h" * (2 * PAGE_SIZE)}
    documents = [{"role": "user", "content": letter * size} for letter, size in (("a", 70), ("b", 40), ("c", 100))]
    question = {"role": "user", "content": "What?"}
    star = {"star": "on", "star_segments": "auto"}
    chats = [[head, *documents[::step], question] for step in (1, -1)]

    def complete(messages: list[dict], salt: str, **xargs) -> tuple[str, dict, int]:
        fields = {"model": MODEL, "max_tokens": 8, "temperature": 0, "messages": messages, "cache_salt": salt}
        response = http.post("/v1/chat/completions", json=fields | {"vllm_xargs": star | xargs})
        assert response.status_code == 200, response.text
        plan, answer = json.loads(response.headers["x-starling-plan"]), response.json()
        return (
            answer["choices"][0]["message"]["content"],
            plan,
            answer["usage"]["prompt_tokens_details"]["cached_tokens"],
        )

    asked = len("user: What?\nassistant:")
    answers = [complete(chats[i], salt) for i in (0, 1) for salt in ("auto", f"cold auto {i}")]
    total = answers[0][1]["prompt_tokens"]
    assert [cached for *_, cached in answers] == [0, 0, total - asked, 0]
    assert answers[0][0] == answers[1][0] and answers[2][0] == answers[3][0]
    assert all(plan["context_end"] == total - asked and plan["star_blocks"] == 4 for _, plan, _ in answers)
    sources = [plan.pop("document_sources") for _, plan, _ in answers]
    assert all(plan == answers[0][1] for _, plan, _ in answers)
    computed = [sum(document.get("computed", 0) for document in documents) for documents in sources]
    assert computed == [computed[0], computed[0], 0, computed[0]]
    assert computed[0] > 0

    # The same borders by offsets of the tokens that /tokenize returns, of which each is a byte.
    ids = http.post("/tokenize", json={"model": MODEL, "messages": chats[0]}).json()["tokens"]
    lengths = [len(f"{one['role']}: {one['content']}\n") for one in chats[0][:-1]]
    offsets = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    assert (len(ids), offsets[-1]) == (total, total - asked)
    by_offsets = complete(chats[0], "auto", star_segments=offsets)
    assert not any(document.get("computed", 0) for document in by_offsets[1].pop("document_sources"))
    assert by_offsets == (answers[0][0], answers[0][1], total - asked)

    chosen = pb.StarOptions(mode=pb.StarOptions.MODE_ON, segments="auto")
    sampling = pb.SamplingParams(temperature=0, max_tokens=8)
    for messages, expected in zip(chats, answers[::2], strict=True):
        prompt = pb.Chat(messages=[pb.ChatMessage(**one) for one in messages])
        text, _, final = read(generate(request(chosen, text=None, chat=prompt, sampling=sampling, cache_salt="auto")))
        assert (text, final.plan.context_end) == (expected[0], total - asked)
        assert final.usage.cached_tokens == total - asked


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("path", PATHS[1:])
def test_messages_are_segments_on_every_path_of_chats(http, path, stream):
    parts = [("user", "h" * 60), ("assistant", "a" * 50), ("user", "b" * 70), ("user", "What?")]
    messages = [{"role": role, "content": content} for role, content in parts]
    key = "input" if path == "/v1/responses" else "messages"
    star = {"star": "on", "star_segments": "auto"}
    with http.stream("POST", path, json=body(path, stream=stream, xargs=star, **{key: messages})) as response:
        response.read()
    assert response.status_code == 200, response.text
    plan = json.loads(response.headers["x-starling-plan"])
    lengths = [len(f"{role}: {content}\n") for role, content in parts]
    assert (plan["star_blocks"], plan["context_end"]) == (3, sum(lengths[:-1]))
    assert plan["prompt_tokens"] == sum(lengths) + len("assistant:")
    padding = sum(-length % PAGE_SIZE for length in lengths[:-1])
    assert (plan["padding_tokens"], plan["anchor_size"]) == (padding, lengths[0] // PAGE_SIZE * PAGE_SIZE)

    with http.stream("POST", path, json=body(path, stream=stream, xargs=star)) as response:  # of one message
        response.read()
    assert response.status_code == 400 and "the chat has one message" in response.text


def test_texts_over_grpc_are_reused_in_another_order(generate):
    """Each text is a segment, and the last one is the question; without star they are one prompt."""
    head, question = "h" * (2 * PAGE_SIZE), "Which?"
    documents = [letter * size for letter, size in (("a", 70), ("b", 40), ("c", 100))]
    star = pb.StarOptions(mode=pb.StarOptions.MODE_ON)
    answers, cached = [], []
    for step in (1, -1):
        texts = [head, *documents[::step], question]
        for salt in ("texts", f"cold texts {step}"):
            prompt = pb.Texts(texts=texts)
            _, tokens, final = read(generate(request(star, text=None, texts=prompt, cache_salt=salt)))
            assert final.plan.context_end == final.usage.prompt_tokens - len(question) == sum(map(len, texts[:-1]))
            assert final.plan.star_blocks == 4
            answers.append(tokens)
            cached.append(final.usage.cached_tokens)
    assert cached == [0, 0, sum(map(len, (head, *documents))), 0]
    assert answers[0] == answers[1] and answers[2] == answers[3]
    dense = [
        read(generate(request(text=None, texts=pb.Texts(texts=texts), cache_salt="one"))),
        read(generate(request(text="".join(texts), cache_salt="another"))),
    ]
    assert dense[0][:2] == dense[1][:2] and dense[0][2].plan.attention == pb.Plan.ATTENTION_DENSE


@pytest.mark.parametrize("kind", ["body", "header", "xargs", "gRPC", "retention", "gRPC retention"])
def test_pages_of_a_session_and_of_a_request_that_says_so_are_retained(http, generate, kind):
    def retained() -> float:
        return metrics(http, "starling:retained_pages")

    before, salt = retained(), f"retained-{kind}"
    path = "/v1/completions"
    fields = body(path, xargs={"session_id": kind} if kind == "xargs" else None, cache_salt=salt)
    if kind == "gRPC":
        read(generate(request(session_id=kind, cache_salt=salt)))
    elif kind == "gRPC retention":
        read(generate(request(pb.StarOptions(retention=["high"]), cache_salt=salt)))
    else:
        fields |= {"session_id": kind} if kind == "body" else {}
        fields |= {"vllm_xargs": {"star_retention": "high"}} if kind == "retention" else {}
        headers = {"X-Session-ID": kind} if kind == "header" else {}
        assert http.post(path, json=fields, headers=headers).status_code == 200
    assert wait_until(lambda: retained() >= before + 701 // PAGE_SIZE, 30)


@pytest.mark.parametrize(
    ("words", "reason"), [("hihg", "did you mean high"), (["high"], "the prompt has no documents: star is off")]
)
def test_retention_that_has_no_effect_gives_400(http, words, reason):
    path = "/v1/completions"
    response = http.post(path, json=body(path, xargs={"star_retention": words}))
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_metrics_count_requests_tokens_keys_and_rejections(http, generate):
    names = [f'starling:requests_total{{attention="{attention}"}}' for attention in ("dense", "star")]
    names += ["starling:context_tokens_total", "starling:keys_attended_total", "starling:keys_dense_total"]
    names += ['starling:plan_rejections_total{option="star_block_size"}']

    def values() -> list[float]:
        text = http.get("/metrics").text
        found = [re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE) for name in names]
        return [float(match[1]) if match else 0.0 for match in found]

    before = values()
    read(generate(request(cache_salt="metrics")))
    _, _, final = read(generate(request(options(STAR), cache_salt="metrics-star")))
    with pytest.raises(grpc.RpcError):
        read(generate(request(options({"star": "on", "star_block_size": 100}))))
    dense, star, tokens, attended, dense_keys, rejected = (
        after - earlier for after, earlier in zip(values(), before, strict=True)
    )
    assert (dense, star, rejected) == (1, 1, 1)
    assert 0 < tokens <= 661
    assert 0 < attended < dense_keys < final.plan.dense_keys


def test_a_request_that_arrives_while_the_front_does_not_run_is_answered(server):
    """On a connection that is kept: uvloop would close it before it reads the request, if its time were over."""
    connection = HTTPConnection(server.http.removeprefix("http://"), timeout=300)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().read()
    local = connection.sock.getsockname()
    server.process.send_signal(signal.SIGSTOP)
    try:
        connection.request("GET", "/v1/models")
        time.sleep(7)
    finally:
        server.process.send_signal(signal.SIGCONT)
    response = connection.getresponse()
    assert response.status == 200 and response.read()
    assert connection.sock.getsockname() == local, "it was not opened again"


def test_sigterm_lets_streams_end_and_exits_with_0(server, channel, generate):
    """The last test: it ends the server."""
    health = health_pb2_grpc.HealthStub(channel)

    def status() -> int:
        return health.Check(health_pb2.HealthCheckRequest()).status

    sampling = pb.SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    call = generate(request(sampling=sampling))
    first = next(call)
    server.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: status() == health_pb2.HealthCheckResponse.NOT_SERVING), "still SERVING"
    with pytest.raises(grpc.RpcError) as refused:
        next(generate(request()))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    _, tokens, final = read(call)
    assert len(first.delta.token_ids) + len(tokens) == final.usage.completion_tokens == 1000
    assert server.process.wait(600) == 0
