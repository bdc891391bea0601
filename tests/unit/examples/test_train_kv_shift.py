"""examples/train_kv_shift.py: the trained model equals the served model and the paper's description."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kv_shift.induction_oracle import make_induction_oracle
from examples import train_kv_shift as example
from starling.attention_backends.kv_shift.reference import logits


def reference(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits of the reference for a checkpoint."""
    return logits(json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors"), ids)


def test_the_exported_model_is_the_trained_one(tmp_path):
    torch.manual_seed(0)
    model = example.Model(1, True)
    example.export(model, tmp_path)
    ids = torch.randint(example.VOCABULARY, (40,))
    with torch.no_grad():
        expected = model(ids[None])[0]
    torch.testing.assert_close(reference(tmp_path, ids.tolist()), expected, atol=1e-4, rtol=0)


def test_weights_start_as_in_the_paper():
    weights = example.Attention(8, 4, True).conv_k
    assert weights.shape == (1, 1, 4, 1, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 4, 1))
    assert bool((weights > 0).all())


def test_sequences_repeat_after_their_period():
    ids = example.sequences(3, 10)
    assert ids.shape == (3, example.TOKENS)
    assert torch.equal(ids[:, 10:], ids[:, :-10])
    assert all(len(set(row[:10].tolist())) == 10 for row in ids)


@pytest.mark.parametrize("length", [9, 400, 1500])
def test_the_oracle_answers_with_the_token_that_followed(tmp_path, length):
    path = make_induction_oracle(tmp_path)
    tokens = random.Random(length)
    ids = [tokens.randrange(256) for _ in range(length)]
    ids[3:5] = [300, 301]
    assert reference(path, [*ids, 300])[-1].argmax().item() == 301
