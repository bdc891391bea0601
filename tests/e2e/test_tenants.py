"""One `starling serve` with an API key for each of two tenants, whose prompts share no cached pages.

The operator's counters and live page say what was cached: to clients the server does not tell it.
"""

import hashlib
import itertools

import grpc
import httpx
import pytest
from smg_grpc_proto import vllm_engine_pb2 as engine_pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from benchmarks.random_llama import byte_tokenizer, make_tiny_llama
from examples.server import serving
from starling.v1 import inference_pb2 as pb
from starling.v1 import inference_pb2_grpc
from tests.browser import Page, browser, find_chromium
from tests.e2e.serving import MODEL, NO_REUSE, PAGE_SIZE, PATHS, body, metrics, options
from tests.e2e.wait import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

A, B, OPERATOR = "key-of-tenant-a", "key-of-tenant-b", "key-of-the-operator"
BLOCK = 128
STAR = {"star": "on", "star_block_size": BLOCK, "star_anchor_size": 0, "star_query_tokens": 40}
LENGTH = 701
WHOLE = LENGTH // PAGE_SIZE * PAGE_SIZE

_numbers = itertools.count(1)


def new_prompt() -> str:
    """A text of LENGTH tokens that has no page in common with those before."""
    return hashlib.shake_256(str(next(_numbers)).encode()).hexdigest(LENGTH)[:LENGTH]


def with_block_of(victim: str) -> str:
    """A prompt of other text around the third star block of the victim's prompt: the guess of an attacker."""
    own = new_prompt()
    return own[: 2 * BLOCK] + victim[2 * BLOCK : 3 * BLOCK] + own[3 * BLOCK :]


class Tenants:
    """Requests of two tenants to one server, and what the operator counts."""

    def __init__(self, server) -> None:
        self.http = httpx.Client(base_url=server.http, timeout=300, limits=NO_REUSE)
        self.channel = grpc.insecure_channel(server.grpc)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.gateway = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)

    def post(self, key: str, path: str, **fields) -> httpx.Response:
        authorization = {"Authorization": f"Bearer {key}"}
        content = fields if path.startswith("/inference") else body(path, **fields)
        response = self.http.post(path, headers=authorization, json=content)
        assert response.status_code == 200, response.text
        return response

    def complete(self, key: str, prompt: str, **fields) -> None:
        self.post(key, "/v1/completions", prompt=prompt, **fields)

    def generate(self, key: str, prompt: str, **fields) -> list[pb.GenerateStreamResponse]:
        sampling = pb.SamplingParams(temperature=0, max_tokens=2)
        request = pb.GenerateStreamRequest(text=prompt, sampling=sampling, **fields)
        return list(self.inference.GenerateStream(request, metadata=[("authorization", f"Bearer {key}")]))

    def upload(self, key: str, prompt: str) -> None:
        head = pb.GenerateStreamRequest(sampling=pb.SamplingParams(temperature=0, max_tokens=2))
        parts = [pb.GenerateUploadStreamRequest(head=head), pb.GenerateUploadStreamRequest(text=prompt)]
        list(self.inference.GenerateUploadStream(iter(parts), metadata=[("authorization", f"Bearer {key}")]))

    def through_gateway(self, key: str, prompt: str) -> list[engine_pb.GenerateResponse]:
        """As a gateway sends a prompt, if it had the tenant's key."""
        sampling = engine_pb.SamplingParams(temperature=0, max_tokens=2)
        request = engine_pb.GenerateRequest(request_id=f"request {next(_numbers)}", sampling_params=sampling)
        request.tokenized.input_ids.extend(byte_tokenizer().encode(prompt))
        return list(self.gateway.Generate(request, metadata=[("authorization", f"Bearer {key}")]))

    def cached_by(self, send, *args, **fields) -> int:
        """The tokens that a request found in the prefix cache."""
        before = metrics(self.http, "starling:cached_tokens_total")
        send(*args, **fields)
        return int(metrics(self.http, "starling:cached_tokens_total") - before)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    # Slow enough that a long output still runs when a test on a busy machine looks at it.
    model = make_tiny_llama(folder / MODEL, num_hidden_layers=6)
    arguments = ["--served-model-name", MODEL, "--dtype", "float32", "--block-size", str(PAGE_SIZE), "--enforce-eager"]
    arguments += ["--max-num-batched-tokens", "512", "--enable-scale-out", "--api-key", A, B, "--cache-salt", "api-key"]
    arguments += ["--live-page", "on", "--grpc-admin-key", OPERATOR]
    with serving(model, *arguments, log=folder / "log") as server:
        tenants = Tenants(server)
        yield tenants
        tenants.http.close()
        tenants.channel.close()


@pytest.mark.parametrize("front", ["complete", "generate", "upload", "through_gateway"])
def test_a_tenant_hits_its_own_pages_and_not_those_of_another(tenants, front):
    send, prompt = getattr(tenants, front), new_prompt()
    assert tenants.cached_by(send, A, prompt) == 0
    assert tenants.cached_by(send, B, prompt) == 0
    assert tenants.cached_by(send, A, prompt) == WHOLE


def test_a_tenant_shares_its_pages_between_http_and_grpc(tenants):
    prompt = new_prompt()
    tenants.complete(A, prompt)
    assert tenants.cached_by(tenants.generate, B, prompt) == 0
    assert tenants.cached_by(tenants.generate, A, prompt) == WHOLE


@pytest.mark.parametrize("front", ["complete", "generate"])
def test_no_block_in_the_middle_of_another_tenants_prompt_is_found(tenants, front):
    victim = new_prompt()
    star = {"xargs": STAR} if front == "complete" else {"star": options(STAR)}
    send = getattr(tenants, front)
    send(A, victim, **star)
    assert tenants.cached_by(send, B, with_block_of(victim), **star) == 0
    assert tenants.cached_by(send, A, with_block_of(victim), **star) == BLOCK


def test_a_salt_separates_the_prompts_of_one_tenant_too(tenants):
    prompt = new_prompt()
    tenants.complete(A, prompt, cache_salt="project 1")
    assert tenants.cached_by(tenants.complete, A, prompt) == 0
    assert tenants.cached_by(tenants.complete, A, prompt, cache_salt="project 2") == 0
    assert tenants.cached_by(tenants.complete, A, prompt, cache_salt="project 1") == WHOLE
    assert tenants.cached_by(tenants.generate, B, prompt, cache_salt="project 1") == 0


@pytest.mark.parametrize("authorization", [{}, {"authorization": "Bearer made-up"}], ids=["no key", "made up"])
def test_every_path_of_vllm_needs_a_valid_key_but_those_of_probes_and_docs(tenants, authorization):
    """The paths are those that vLLM's own server says it has."""
    paths = tenants.http.get("/openapi.json").json()["paths"]
    assert {"/invocations", "/tokenize", "/scale_elastic_ep", "/generative_scoring"} <= paths.keys()
    answers = {
        path: tenants.http.request(method, path, json={}, headers=authorization).status_code
        for path, methods in paths.items()
        for method in methods
    }
    assert {path for path, status in answers.items() if status != 401} == {"/health", "/ping", "/version", "/metrics"}


def test_a_made_up_key_does_not_run_the_model_on_another_path(tenants):
    before = metrics(tenants.http, "vllm:request_success_total")
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 1}
    refused = tenants.http.post("/invocations", json=body, headers={"authorization": "Bearer made-up"})
    assert refused.status_code == 401
    assert metrics(tenants.http, "vllm:request_success_total") == before
    allowed = tenants.http.post("/invocations", json=body, headers={"authorization": f"Bearer {A}"})
    assert allowed.status_code == 200, allowed.text
    assert metrics(tenants.http, "vllm:request_success_total") == before + 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [new_prompt(), new_prompt()]}),
        ("/v1/completions", {"use_beam_search": True, "n": 2, "max_tokens": 1}),
        ("/v1/chat/completions", {}),
        ("/v1/responses", {}),
        ("/v1/messages", {}),
        ("/inference/v1/generate", {}),
    ],
    ids=["batch", "beams", "chat", "responses", "messages", "tokens in"],
)
def test_every_path_keeps_tenants_apart(tenants, path, fields):
    fields = own_prompt(path) | fields
    tenants.post(A, path, **fields)
    assert tenants.cached_by(tenants.post, B, path, **fields) == 0
    assert tenants.cached_by(tenants.post, A, path, **fields) >= WHOLE - PAGE_SIZE


def own_prompt(path: str) -> dict:
    prompt = new_prompt()
    return {
        "/v1/completions": {"prompt": prompt},
        "/v1/responses": {"input": prompt},
        "/inference/v1/generate": {"token_ids": [*prompt.encode()], "sampling_params": {"max_tokens": 2}},
    }.get(path, {"messages": [{"role": "user", "content": prompt}]})


def numbers_of(answer, name: str) -> list:
    """The values of a field anywhere in a JSON answer."""
    if isinstance(answer, dict):
        inner = [value for inside in answer.values() for value in numbers_of(inside, name)]
        return inner + ([answer[name]] if name in answer else [])
    return [value for inside in answer for value in numbers_of(inside, name)] if isinstance(answer, list) else []


@pytest.mark.parametrize("path", PATHS)
def test_no_http_response_says_how_many_tokens_were_cached(tenants, path):
    prompt = own_prompt(path)
    tenants.post(A, path, **prompt)
    responses = []

    def again() -> None:
        responses.append(tenants.post(A, path, **prompt))

    assert tenants.cached_by(again) > 0
    names = ("cached_tokens", "cache_read_input_tokens")
    found = [value for name in names for value in numbers_of(responses[0].json(), name)]
    assert not any(found), responses[0].text
    assert "cached" not in str(responses[0].headers)


def test_no_grpc_event_says_how_many_tokens_were_cached(tenants):
    prompt = new_prompt()
    tenants.generate(A, prompt)
    events: list[pb.GenerateStreamResponse] = []
    assert tenants.cached_by(lambda: events.extend(tenants.generate(A, prompt, progress=True))) == WHOLE
    assert events[-1].final.usage.prompt_tokens == LENGTH
    assert not any(event.final.usage.cached_tokens or event.progress.cached_tokens for event in events)


def look(tenants, key: str | None = OPERATOR) -> httpx.Response:
    return tenants.http.get("/starling/live.json", headers={"Authorization": f"Bearer {key}"} if key else {})


def test_gateways_learn_nothing_of_tenants(tenants):
    """Their service needs a key; without the operator's it tells neither other prompts nor what is cached."""
    prompt = new_prompt()
    tenants.through_gateway(A, prompt)
    assert {response.complete.cached_tokens for response in tenants.through_gateway(A, prompt)} == {0}
    of_a = [("authorization", f"Bearer {A}")]
    calls = [
        (tenants.gateway.Generate, engine_pb.GenerateRequest(request_id="x", text="abc"), None),
        (tenants.gateway.GetTokenizer, common_pb2.GetTokenizerRequest(), None),
        (tenants.gateway.SubscribeKvEvents, common_pb2.SubscribeKvEventsRequest(), of_a),
        (tenants.gateway.FlushCache, common_pb2.FlushCacheRequest(), of_a),
    ]
    for method, request, metadata in calls:
        with pytest.raises(grpc.RpcError) as raised:
            answer = method(request, metadata=metadata)
            list(answer) if hasattr(answer, "__iter__") else answer
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    path = "/starling/cached/v1/completions"
    own = {"model": MODEL, "prompt": prompt}
    assert tenants.http.post(path, json=own).status_code == 401
    refused = tenants.http.post(path, json=own, headers={"authorization": f"Bearer {A}"})
    assert (refused.status_code, "--enable-prompt-tokens-details" in refused.text) == (403, True)


def test_the_live_page_shows_the_operator_what_was_cached_and_no_text_of_a_prompt(tenants):
    assert [look(tenants, key).status_code for key in (None, A, B, OPERATOR)] == [401, 401, 401, 200]
    prompt = new_prompt()
    for name in ("first", "again"):
        tenants.complete(A, prompt, xargs=STAR, request_id=name)

    def ended() -> dict[str, dict]:
        return {row["id"]: row for row in look(tenants).json()["ended"]}

    assert wait_until(lambda: "cmpl-again-0" in ended()), "a snapshot is shared for half a second"
    response = look(tenants)
    first, again = (ended()[f"cmpl-{name}-0"] for name in ("first", "again"))
    assert (first["cached"], again["cached"]) == (0, WHOLE)
    assert (again["star_blocks_done"], again["star_blocks"], again["prompt"]) == (6, 6, LENGTH)
    assert again["keys_attended"] < again["dense_keys"] == LENGTH * (LENGTH + 1) // 2
    assert wait_until(lambda: look(tenants).json()["totals"]["cached_tokens"] >= WHOLE), "they are read every 2 s"
    assert prompt[:8] not in response.text


HOSTILE = "<img src=x onerror='attacked=1'><script>attacked=1</script>"


def log_in(page: Page, key: str) -> None:
    page.wait_for("!document.getElementById('login').hidden")
    page.evaluate(f"document.getElementById('key').value = {key!r}")
    page.evaluate("document.querySelector('#login button').click()")


def test_the_live_page_in_a_browser(tenants, tmp_path):
    """A client has chosen an id that would be markup."""
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium; `make browser` installs one")
    address = str(tenants.http.base_url)
    prompt = new_prompt()
    asked = body("/v1/completions", prompt=prompt, xargs=STAR, stream=True, max_tokens=7000, ignore_eos=True)
    headers = {"Authorization": f"Bearer {A}", "X-Request-Id": HOSTILE}
    with browser(program, tmp_path) as page:
        page.open(f"{address}/starling/live")
        log_in(page, A)
        page.wait_for("!document.getElementById('refused').hidden")
        log_in(page, OPERATOR)
        page.wait_for("!document.getElementById('content').hidden")
        with tenants.http.stream("POST", "/v1/completions", headers=headers, json=asked) as response:
            lines = response.iter_lines()  # without a name, its end would close the response
            next(lines)
            row = page.wait_for(DECODING)  # a snapshot may be from before the first token
            assert all(text in row for text in (f"cmpl-{HOSTILE}-0", "decode", "6 of 6", f"{LENGTH} of {LENGTH}")), row
            before = generated(page)
            assert page.wait_for(f"({GENERATED}) > {before}")
            page.resize(360, 800)
            page.wait_for("innerWidth == 360")
            assert page.evaluate(WIDTHS % "scroll") == page.evaluate(WIDTHS % "client"), "nothing is cut off"
        ended = page.wait_for("document.querySelector('#ended tbody tr .abort')?.closest('tr').innerText")
        assert HOSTILE in ended
        assert page.evaluate("typeof attacked") == "undefined"
        assert page.evaluate("document.querySelectorAll('img, main script').length") == 0
        assert prompt[:8] not in page.evaluate("document.documentElement.outerHTML")
        assert page.evaluate("location.href") == f"{address}/starling/live", "no key is in the address"
        assert not page.problems
        loaded = {loaded.removeprefix(address) for loaded in page.addresses} - {"data:,"}
        assert loaded == {"/starling/live", "/starling/live.json"}


DECODING = (
    "[...document.querySelectorAll('#requests tbody tr')].map(row => row.innerText).find(row => row.includes('decode'))"
)
WIDTHS = "document.documentElement.%sWidth"
GENERATED = "parseInt(document.querySelector('#requests [data-label=Generated] .main').innerText.replace(',', ''))"


def generated(page: Page) -> int:
    return page.evaluate(GENERATED)
