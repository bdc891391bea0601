"""The example that trains Attamba: its model is the reference's, and what it exports is what it trained."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.attamba.random_model import make_random_attamba
from benchmarks.random_llama import byte_tokenizer
from examples import attamba_model
from examples.attamba_model import load_attamba
from examples.stdlib_text import END, byte_ids
from examples.train_attamba import count_parameters, export, kv_bytes, make_model, parse
from tests.references import attamba as reference

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "ssm_heads": 2,
    "ssm_state_dim": 5,
    "ssm_inner": 12,
}
TINY_RUN = ["--dim", "16", "--heads", "2", "--ffn", "24", "--ssm-inner", "8", "--ssm-state", "4", "--ssm-heads", "2"]
CHECKPOINTS = Path(__file__).resolve().parents[3] / "examples" / "checkpoints"


@pytest.fixture
def short_blocks(monkeypatch):
    """Attention over more than 16 tokens is computed in blocks of 12."""
    attamba_model.visible_blocks.cache_clear()
    monkeypatch.setattr(attamba_model, "UNCUT", 16)
    monkeypatch.setattr(attamba_model, "BLOCK", 12)
    yield
    attamba_model.visible_blocks.cache_clear()


def expected_logits(path: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reference's logits of a checkpoint."""
    weights = {name: weight.to(dtype) for name, weight in load_file(path / "model.safetensors").items()}
    return reference.logits(weights, json.loads((path / "config.json").read_text()), tokens)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize(("chunk_size", "layers"), [(2, 4), (4, 4), (8, 4), (8, 3), (3, 4), (1, 2)])
def test_the_model_is_that_of_the_reference(chunk_size, layers, window, tmp_path):
    """Also where P is not a multiple of n, less than n, or 1; sequences end in token 0, in whole chunks and inside."""
    sizes = SMALL | {"num_hidden_layers": layers, "token_chunk": chunk_size, "leading_tokens": window}
    model = load_attamba(make_random_attamba(tmp_path, seed=3, dtype=torch.float64, **sizes), torch.float64)
    tokens = torch.randint(61, (43,), generator=torch.Generator().manual_seed(chunk_size * window))
    with torch.inference_mode():
        for length in (1, 2, chunk_size + 1, 24, 43):
            expected = expected_logits(tmp_path, tokens[:length], torch.float64)
            assert (model(tokens[None, :length])[0] - expected).abs().max() < 1e-10


def test_the_exported_attamba_is_the_trained_one(tmp_path):
    model = make_model(parse([*TINY_RUN, "--out", str(tmp_path)]))
    export(model, tmp_path, torch.float32, byte_tokenizer())
    tokens = torch.randint(257, (20,))
    with torch.inference_mode():
        assert (model(tokens[None])[0] - expected_logits(tmp_path, tokens, torch.float32)).abs().max() < 1e-4
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["architectures"], fields["eos_token_id"]) == (["AttambaForCausalLM"], END)
    assert (tmp_path / "tokenizer.json").exists()


def test_the_exported_transformer_is_the_trained_one(tmp_path):
    model = make_model(parse([*TINY_RUN, "--out", str(tmp_path), "--model", "transformer", "--kv-cut", "4"]))
    export(model, tmp_path, torch.float32, byte_tokenizer())
    llama = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(257, (2, 20))
    with torch.inference_mode():
        assert (llama(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_tokens_are_those_of_the_byte_tokenizer():
    sample = bytes(range(1, 128)).decode() + "é漢👩‍🚀 ÿ"
    ids = byte_ids()[torch.tensor(list(sample.encode()))].tolist()
    assert ids == byte_tokenizer().encode(sample, add_special_tokens=False)
    assert byte_tokenizer().eos_token_id == END
    assert sorted(byte_ids().tolist()) == list(range(256))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_gradient_of_the_convolution(length):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, length, 5), (5, 4))
    )
    assert torch.autograd.gradcheck(attamba_model.CausalConv.apply, (x, weight))


@pytest.mark.parametrize("cut", [1, 2, 4, 8])
def test_models_compared_have_equal_sizes(cut, tmp_path):
    """Equal numbers of parameters within 1 %, and equal cache bytes per token."""
    attamba = make_model(parse(["--out", str(tmp_path), "--chunk", str(cut)]))
    transformer = make_model(parse(["--out", str(tmp_path), "--model", "transformer", "--kv-cut", str(cut)]))
    assert count_parameters(transformer) == pytest.approx(count_parameters(attamba), rel=0.01)
    assert kv_bytes(transformer)[0] == kv_bytes(attamba)[0] == 2 * 4 * 2 * 128 / cut


@pytest.mark.parametrize("name", ["attamba-p4-l32", "attamba-p8-l16", "transformer"])
def test_committed_checkpoints_are_trained(name):
    """A uniform guess takes 8 bits per byte. The text is part of the training text."""
    tokens = byte_ids()[torch.tensor(list(inspect.getsource(textwrap)[:1000].encode()))].long()
    if name == "transformer":
        llama = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits = llama(tokens[None, :-1]).logits[0]
    else:
        logits = expected_logits(CHECKPOINTS / name, tokens[:-1], torch.float32)
    assert torch.nn.functional.cross_entropy(logits, tokens[1:]).item() / math.log(2) < 4
