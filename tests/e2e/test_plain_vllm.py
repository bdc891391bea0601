"""Unmodified `vllm serve` and `vllm bench` with the plugin activated: counts, not times."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.random_llama import make_tiny_llama
from examples.server import Server, free_ports
from tests.e2e.wait import wait_until

pytestmark = pytest.mark.e2e

VLLM = str(Path(sys.executable).with_name("vllm"))
ENV = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
ENGINE = ("--dtype", "float32", "--enforce-eager", "--block-size", "32")
PROMPTS, TOKENS, NEW = 5, 600, 4
STAR = {"star": "on", "star_block_size": 128, "star_query_tokens": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """`vllm serve`, with Starling activated by --additional-config alone."""
    [port], log = free_ports(0), tmp_path_factory.mktemp("server") / "log"
    command = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *ENGINE]
    command += ["--additional-config", '{"starling": {"live_page": "on"}}', "--max-num-batched-tokens", "512"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=ENV, process_group=0)
    server = Server(process, f"http://127.0.0.1:{port}", "", str(model), log)
    try:
        server.wait(600, lambda message: None)
        yield server
    finally:
        server.stop()


def complete(server, **fields) -> httpx.Response:
    body = {"model": server.model, "prompt": "ab" * 300, "max_tokens": 8, "temperature": 0, "vllm_xargs": STAR}
    return httpx.post(f"{server.http}/v1/completions", json=body | fields, timeout=300)


def test_a_response_has_the_plan(server):
    response = complete(server)
    plan = json.loads(response.headers["x-starling-plan"])
    assert (plan["attention"], plan["star_blocks"], plan["context_end"]) == ("star", 5, 560)


def test_the_live_page_is_an_option_of_plain_vllm_too(server):
    def ended() -> list[dict]:
        return httpx.get(f"{server.http}/starling/live.json", timeout=300).json()["ended"]

    ended()
    complete(server)
    assert wait_until(ended), "a snapshot is shared for half a second"
    assert (ended()[0]["attention"], ended()[0]["star_blocks_done"], ended()[0]["generated"]) == ("star", 5, 8)


@pytest.mark.parametrize("stream", [False, True])
def test_bad_options_give_400(server, stream):
    response = complete(server, stream=stream, vllm_xargs=STAR | {"star_block_size": 100})
    assert response.status_code == 400
    assert "star_block_size=100 is refused" in response.text
    assert complete(server).status_code == 200


def test_structured_output_with_star(server):
    """The output of a random model follows the grammar, and star stays engaged."""
    response = complete(server, structured_outputs={"choice": ["anchor", "block"]}, max_tokens=16)
    assert response.json()["choices"][0]["text"] in ("anchor", "block")
    assert json.loads(response.headers["x-starling-plan"])["attention"] == "star"


def test_a_response_has_a_plan_for_each_prompt(server):
    response = complete(server, prompt=["ab" * 300, "cd" * 100])
    plans = json.loads(response.headers["x-starling-plan"])
    assert [plan["prompt_tokens"] for plan in plans] == [600, 200]


def test_pythons_http_client_reads_the_response_to_many_prompts(server):
    url = httpx.URL(server.http)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=300)
    body = {"model": server.model, "prompt": ["ab"] * 100, "max_tokens": 1}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert len(json.loads(response.read())["choices"]) == 100
    assert len(response.headers.get_all("x-starling-plan")) == 1
    connection.close()


def vllm_bench(*arguments: str) -> str:
    """Run `vllm bench ...` in the environment of the tests; returns its output."""
    done = subprocess.run([VLLM, "bench", *arguments], capture_output=True, text=True, timeout=900, env=ENV)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def counters(server) -> dict[str, float]:
    text = httpx.get(f"{server.http}/metrics", timeout=300).text
    return {name: float(value) for name, value in re.findall(r"^(starling:\S+) (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("options", [{}, STAR], ids=["dense", "star"])
def test_bench_serve(server, model, tmp_path, options):
    """The JSON is complete, and the server counts star requests and star rows only for requests with star options."""
    before = counters(server)
    vllm_bench(
        *("serve", "--backend", "openai", "--base-url", server.http, "--endpoint", "/v1/completions"),
        *("--model", server.model, "--tokenizer", str(model), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(TOKENS), "--random-output-len", str(NEW), "--num-prompts", str(PROMPTS)),
        *("--extra-body", json.dumps({"vllm_xargs": options})),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == PROMPTS
    assert result["total_output_tokens"] == PROMPTS * NEW
    increase = {name: value - before[name] for name, value in counters(server).items()}
    used, other = ("star", "dense") if options else ("dense", "star")
    assert increase[f'starling:requests_total{{attention="{used}"}}'] >= PROMPTS
    assert increase[f'starling:requests_total{{attention="{other}"}}'] == 0
    context_tokens = increase["starling:context_tokens_total"]
    assert context_tokens >= PROMPTS * (TOKENS - 40 - 128) if options else context_tokens == 0
    assert increase["starling:keys_attended_total"] < increase["starling:keys_dense_total"] or not options


def test_bench_throughput(model, tmp_path):
    """With star on, every prompt completes, and vLLM's log has the star defaults."""
    output = vllm_bench(
        *("throughput", "--model", str(model), *ENGINE),
        *("--dataset-name", "random", "--random-input-len", str(TOKENS), "--random-output-len", str(NEW)),
        *("--num-prompts", str(PROMPTS), "--output-json", str(tmp_path / "result.json")),
        *("--additional-config", json.dumps({"starling": {"star": "on", "star_block_size": 128}})),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_requests"] == PROMPTS
    assert result["total_num_tokens"] >= PROMPTS * TOKENS
    assert "Starling: star=on, Star Attention for all prompts; star_block_size=128" in output
