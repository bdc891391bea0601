"""examples/train_kv_shift.py: the exported model is the trained one."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from examples import train_kv_shift as example
from tests.references.kv_shift import logits


def test_the_exported_model_is_the_trained_one(tmp_path):
    torch.manual_seed(0)
    model = example.Model(1, True)
    example.export(model, tmp_path)
    ids = torch.randint(example.VOCABULARY, (40,))
    with torch.no_grad():
        expected = model(ids[None])[0]
    config = json.loads((tmp_path / "config.json").read_text())
    found = logits(config, load_file(tmp_path / "model.safetensors"), ids.tolist())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
