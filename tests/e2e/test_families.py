"""Servers of the two model families: HTTP and gRPC give the log-probabilities of the plain references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from benchmarks.attamba.random_model import make_random_attamba
from examples.server import serving
from starling.client import Client
from tests.parity.harness import max_gap
from tests.parity.kv_shift_cases import Model, random_ids
from tests.parity.test_attamba import TINY, dense_logprobs
from tests.parity.test_kv_shift import CONFIGS

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("forked")]

LENGTH, NEW = 300, 4
Reference = Callable[[list[int]], torch.Tensor]
"""A prompt and its output -> the log-probability of each token but the first."""


def kv_shift(folder: Path) -> tuple[Path, Reference]:
    model = Model.random(folder / "kv-shift", CONFIGS["llama"])
    return model.path, lambda ids: model.logprobs({"ids": ids[:-NEW], "extra_args": {}}, ids[-NEW:], dense=True)


def attamba(folder: Path) -> tuple[Path, Reference]:
    path = folder / "attamba"
    make_random_attamba(path, num_hidden_layers=3, token_chunk=4, leading_tokens=5, **TINY)
    return path, lambda ids: dense_logprobs(path, ids)


@pytest.mark.parametrize("make", [kv_shift, attamba], ids=lambda make: make.__name__)
def test_both_fronts_give_the_logprobs_of_the_reference(make, tmp_path: Path) -> None:
    path, reference = make(tmp_path)
    prompt = random_ids(1, LENGTH)
    body = {"model": str(path), "prompt": prompt, "max_tokens": NEW, "temperature": 0, "logprobs": 1}
    body |= {"ignore_eos": True, "return_token_ids": True}
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "128"]
    with serving(path, *options, log=tmp_path / "log") as server:
        response = httpx.post(f"{server.http}/v1/completions", json=body, timeout=300)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        with Client(server.grpc) as client:
            reply = client.generate(prompt, max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0)
    expected = reference(prompt + choice["token_ids"])[-NEW:]
    assert reply.choices[0].token_ids == choice["token_ids"]
    assert max_gap(choice["logprobs"]["token_logprobs"], expected) <= 1e-4
