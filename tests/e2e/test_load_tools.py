"""GuideLLM and AIPerf send requests to a server, with options of Star Attention and documents in `vllm_xargs`."""

from __future__ import annotations

import random

import httpx
import pytest

from benchmarks.load_tools import MEASURES, NEW_TOKENS, PROGRAMS, SEPARATOR, make_documents, make_prompts
from benchmarks.random_llama import SPECIAL, make_tiny_llama
from examples.server import serving
from tests.e2e.serving import metrics

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

PROMPTS = 2
COUNTS = ('starling:requests_total{attention="star"}', "starling:document_tokens_total")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load-tools")
    model = make_tiny_llama(folder / "tiny")
    options = ["--served-model-name", "model", "--dtype", "float32", "--block-size", "32", "--enforce-eager"]
    with serving(model, *options, grpc_port=None, log=folder / "log") as server:
        yield server, str(model)


@pytest.mark.parametrize("tool", PROGRAMS)
def test_its_requests_have_documents(server, tmp_path, tool):
    if not PROGRAMS[tool].exists():
        pytest.skip("`make load-tools` installs it")
    server, model = server
    documents = [document[:200] for document in make_documents()]
    prompts = [prompt.replace(SEPARATOR, SPECIAL) for prompt in make_prompts(documents, PROMPTS, random.Random(tool))]
    xargs = {"star": "on", "star_segments": SPECIAL}
    body = {"temperature": 0, "ignore_eos": True, "max_tokens": NEW_TOKENS, "vllm_xargs": xargs}
    with httpx.Client(base_url=server.http, timeout=600) as http:
        before = [metrics(http, name) for name in COUNTS]
        times = MEASURES[tool](server.http, model, prompts, body, tmp_path)
        assert len(times) == PROMPTS and all(time > 0 for time in times)
        after = [metrics(http, name) for name in COUNTS]
    of_documents = [prompt.rpartition(SPECIAL)[0].replace(SPECIAL, ".") for prompt in prompts]  # a token is a byte
    counted = [new - old for new, old in zip(after, before, strict=True)]
    assert counted == [PROMPTS, len("".join(of_documents).encode())]
