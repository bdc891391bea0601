"""From prompts to answers: `starling distil` in a process of its own, and a server of two replicas with its adapter."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from benchmarks.random_llama import SPECIAL, make_tiny_llama
from examples.server import serving
from starling.client import Client
from starling.config.adapter import read_adapter
from tests.adapters import make_adapter
from tests.e2e.replicas import (
    ENGINE_OPTIONS,
    PAGE_SIZE,
    TOKENS,
    assert_same,
    complete,
    complete_on_one,
    computed,
    computed_since,
    post,
    random_prompt,
)

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

STARLING = Path(sys.executable).with_name("starling")
MARK = 256
"""The token of SPECIAL."""

TRAINING = [
    *("--segments", "|", "--tokens", "256", "--questions", "3", "--steps", "6", "--evaluations", "3"),
    *("--rank", "4", "--held-out", "1", "--answer-tokens", "6", "--dtype", "float32"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def write_prompts(path: Path, count: int = 10) -> Path:
    """Prompts of three documents and a question; every other one has an answer, and some are chats."""
    rng, lines = random.Random(0), []
    for number in range(count):
        parts = [" ".join(rng.choices(("red", "green", "blue", "grey"), k=12)) for _ in range(4)]
        line: dict[str, Any] = {"prompt": "|".join(["Read.", *parts])}
        if number % 3 == 2:
            line = {"messages": [{"role": "user", "content": part} for part in parts]}
        lines.append(line | ({"answer": "red"} if number % 2 else {}))
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def distil(*arguments: str | Path, **options: Any) -> subprocess.Popen:
    command = [STARLING, "distil", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on own prompts, interrupted once, and taken up again."""
    folder = tmp_path_factory.mktemp("distil")
    given = [model, "--prompts", write_prompts(folder / "mine.jsonl"), "--out", folder / "adapter", *TRAINING]
    process = distil(*given)
    while not (folder / "adapter" / "training.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    if process.returncode:  # else it had ended before
        assert process.returncode == 130
        assert "goes on" in output
        assert not (folder / "adapter" / "distil.json").exists()
        process = distil(*given)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"--star-adapter {folder / 'adapter'}" in output
    return folder / "adapter"


def test_the_adapter_is_pefts_and_says_how_it_was_made(adapter: Path) -> None:
    assert PeftConfig.from_pretrained(adapter).r == 4
    made = json.loads((adapter / "distil.json").read_text())
    assert made["purposes"] == ["documents"]
    assert [point["step"] for point in made["curve"]] == [0, 2, 4, 6]
    assert set(made["curve"][0]["loss"]) == {"own"}
    names = {path.name for path in adapter.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "distil.json"}
    assert not names & {"training.pt", "README.md"}


def test_a_training_goes_on_from_an_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    """By a step so small that it changes nothing: the adapter is the one that it began with."""
    given = [model, "--start", adapter, "--prompts", write_prompts(tmp_path / "mine.jsonl"), "--out", tmp_path / "on"]
    given += ["--segments", "|", "--steps", "1", "--evaluations", "1", "--learning-rate", "1e-12", "--dtype", "float32"]
    process = distil(*given)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "on"))
    assert before.keys() == after.keys() and any(values.abs().max() > 0.01 for values in after.values())
    assert all(torch.allclose(values, after[name], atol=1e-6) for name, values in before.items())
    assert (
        json.loads((tmp_path / "on" / "distil.json").read_text())["setup"]["start"] == read_adapter(str(adapter)).digest
    )


@pytest.fixture(scope="module")
def server(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory):
    """Its adapter is one with a large effect: that of the training is of a few steps, and is served below."""
    folder = tmp_path_factory.mktemp("server")
    strong = make_adapter(folder / "strong", model)
    options = [*ENGINE_OPTIONS, "--star-adapter", str(strong), "--star", "on", "--data-parallel-size", "2"]
    options += ["--star-segments", SPECIAL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a machine may have fewer cores than replicas
        with serving(model, *options, log=folder / "log") as started:
            yield started


def prompt_of(seed: int, order: int = 1) -> tuple[list[int], dict[str, Any]]:
    """A head of 64 tokens, four documents, a question; and the options that say where they start."""
    documents = [[MARK, *random_prompt(seed + number, 299)] for number in range(4)]
    parts = [random_prompt(seed + 9, 64), *documents[::order], random_prompt(seed + 8, 40)]
    starts = [64 + 300 * number for number in range(4)]
    ids = [token for part in parts for token in part]
    return ids, {"star": "on", "star_segments": starts, "star_query_tokens": 40}


def test_documents_run_with_it_over_both_fronts_and_others_do_not(server) -> None:
    ids, star = prompt_of(1)
    with_it = complete(server, ids, star | {"star_replicas": 1})
    declined = complete(server, ids, star | {"star_replicas": 1, "star_adapter": "off"})
    blocks = complete(server, ids, {"star": "on", "star_block_size": 256, "star_segments": "off"})
    dense = complete(server, ids, {"star": "off"})
    assert [output[2].get("adapter", False) for output in (with_it, declined, blocks, dense)] == [
        True,
        False,
        False,
        False,
    ]
    assert max(abs(a - b) for a, b in zip(with_it[1], declined[1], strict=True)) > 0.01
    with Client(server.grpc) as client:
        for adapter in (None, "off"):
            reply = client.generate(
                ids,
                star="on",
                star_segments=star["star_segments"],
                star_query_tokens=40,
                star_replicas=1,
                star_adapter=adapter,
                max_tokens=TOKENS,
                temperature=0,
                ignore_eos=True,
                n=1,
            )
            expected = with_it if adapter is None else declined
            assert reply.plan.adapter == (adapter is None)
            assert [f"token_id:{token}" for token in reply.choices[0].token_ids] == expected[0]
    models = json.load(urllib.request.urlopen(f"{server.http}/v1/models"))["data"]
    assert [each["id"] for each in models] == [server.model]


def test_its_documents_are_found_on_each_replica_and_looked_up(server) -> None:
    (ids, star), before = prompt_of(20), computed(server, 2)
    first = complete(server, ids, star)
    assert first[2]["replicas"] == 2 and first[2]["adapter"]
    assert min(computed_since(server, before)) > 300, "both have computed documents"
    assert_same(first, complete_on_one(server, ids, star))
    (ids, more), before = prompt_of(20, -1), computed(server, 2)
    again = complete(server, ids, star | more)
    assert sum(computed_since(server, before)) <= 2 * PAGE_SIZE + 40 + TOKENS
    assert_same(again, complete_on_one(server, ids, star | more))
    body = {"model": server.model, "prompt": ids, "max_tokens": 1}
    for adapter, least in (("auto", 1200), ("off", 0)):
        asked = body | {"vllm_xargs": star | more | {"star_adapter": adapter}}
        request = urllib.request.Request(
            f"{server.http}/starling/cached/v1/completions",
            json.dumps(asked).encode(),
            {"content-type": "application/json"},
        )
        found = json.load(urllib.request.urlopen(request))
        cached = max(sum(each["cached_tokens"] for each in one["documents"]) for one in found["replicas"])
        assert cached >= least if least else cached == 0


def test_a_wrong_value_is_refused(server) -> None:
    for value in ("maybe", "/a/folder", 1):
        with pytest.raises(urllib.error.HTTPError) as raised:
            post(server, random_prompt(3, 100), {"star": "on", "star_adapter": value})
        error = json.load(raised.value)["error"]
        assert raised.value.code == 400
        assert error["message"].startswith(f"star_adapter={value!r} is refused")
        assert "auto, off" in error["message"]


def test_what_distil_wrote_is_served(model: Path, adapter: Path, tmp_path: Path) -> None:
    options = [*ENGINE_OPTIONS, "--star-adapter", str(adapter), "--star", "on", "--star-segments", "|"]
    with serving(model, *options, log=tmp_path / "log") as server:
        prompt = json.loads((adapter.parent / "mine.jsonl").read_text().splitlines()[0])["prompt"]
        body = {"model": server.model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{server.http}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            plan = json.loads(response.headers["x-starling-plan"])
        assert plan["documents"] and plan["adapter"]
