"""Which layers' queries can be re-rotated: found out by running the layer at two positions, whatever it is made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from starling.attention_backends.star.document_layers import make_rotations, rotation_problem
from starling.vllm_compat import models
from starling.vllm_compat.models import AttentionBlock, attention_blocks

HEADS, KV_HEADS, SIZE, HIDDEN, POSITIONS = 4, 2, 32, 24, 4096
ROPES = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}


class FakeAttention(torch.nn.Module):
    head_size, layer_name = SIZE, "layer"

    def forward(self, query, key, value):
        raise AssertionError("a step without metadata")


class Block(torch.nn.Module):
    """An attention block of a model; ``change`` is what it does to queries behind the rotary embedding."""

    def __init__(self, parameters=None, is_neox_style=True, change=lambda query, positions: query, dtype=torch.float32):
        super().__init__()
        with set_current_vllm_config(VllmConfig(), check_compile=False):
            self.rotary_emb = get_rope(SIZE, POSITIONS, is_neox_style, parameters or {}, dtype=dtype)
        self.projection = torch.nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * SIZE, dtype=dtype)
        self.attn, self.change = FakeAttention(), change

    def forward(self, positions, hidden_states):
        query, key, value = self.projection(hidden_states).split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
        query, key = self.rotary_emb.forward_native(positions, query, key)
        return self.attn(self.change(query, positions), key, value)


@pytest.fixture(autouse=True)
def fake_attention(monkeypatch):
    monkeypatch.setattr(models, "Attention", FakeAttention)


def problem(block: Block) -> str | None:
    model = torch.nn.ModuleDict({"self_attn": block})
    (found,) = attention_blocks(model).values()
    return rotation_problem(found, make_rotations(model, 64)["layer"], HIDDEN, block.rotary_emb.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)
def test_rotary_embeddings_with_fixed_frequencies(parameters, is_neox_style, dtype):
    torch.manual_seed(0)
    assert problem(Block(parameters, is_neox_style, dtype=dtype)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda query, positions: query * torch.linspace(0.5, 2, HEADS * SIZE),
        lambda query, positions: query * (1 + 0.1 * torch.log1p(positions.float()))[:, None],
        lambda query, positions: query[:, torch.arange(HEADS * SIZE - 1, -1, -1)],
    ],
    ids=["a norm behind the rotary embedding", "a scale by position", "another order"],
)
def test_queries_that_are_changed_behind_the_rotary_embedding(change):
    torch.manual_seed(0)
    assert "its queries at one position" in problem(Block(change=change))


def test_a_layer_that_leaves_its_rotary_embedding_out(monkeypatch):
    block = Block()  # vLLM keeps rotary embeddings, and gives equal layers the same one
    monkeypatch.setattr(block.rotary_emb, "forward_native", lambda positions, query, key: (query, key))
    assert "its queries at one position" in problem(block)


def test_a_block_that_takes_other_arguments():
    block = Block()
    block.forward = lambda hidden_states: hidden_states
    assert "can't be looked at" in problem(block)


def test_layers_run_without_their_adapters():
    """A layer with LoRA needs a batch to run."""
    block = Block()
    base = block.projection

    class WithLora(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = base

    block.projection = WithLora()
    assert problem(block) is None
    assert isinstance(block.projection, WithLora)


def test_layers_that_share_a_rotary_embedding_share_the_table():
    first, second = Block(), Block()
    second.rotary_emb = first.rotary_emb
    second.attn.layer_name = "other"
    made = make_rotations(torch.nn.ModuleDict({"a": first, "b": second}), POSITIONS)
    assert made["layer"] is made["other"]
    assert made["layer"].cos.shape == (POSITIONS, SIZE // 2)


def test_a_layer_without_a_rotary_embedding_has_no_rotation():
    block = Block()
    del block.rotary_emb
    model = torch.nn.ModuleDict({"self_attn": block})
    assert make_rotations(model, 8) == {}
    assert AttentionBlock(block.attn, SimpleNamespace()).rotary is None
