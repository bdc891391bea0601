"""`benchmarks.attamba.from_transformer`: its Llama, what a token sees with each method, the mixer to start from."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from benchmarks.attamba import from_transformer
from benchmarks.attamba.from_transformer import Llama, Method, attend, boundaries, chunk_means, pass_through, rotate
from benchmarks.random_llama import make_random_llama

LENGTH, THETA = 29, 1e4


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return make_random_llama(tmp_path_factory.mktemp("llama"), **sizes, **heads)


def test_all_keys_give_the_bits_of_the_model(llama, monkeypatch):
    monkeypatch.setattr(from_transformer, "ROWS", 16)
    tokens = torch.randint(256, (50,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(tokens[None, :-1]).logits[0]
    expected = cross_entropy(logits, tokens[1:], reduction="none") / math.log(2)
    model = Llama(llama, torch.float32)
    assert (model.bits(tokens, Method(1)) - expected).abs().max() < 1e-3
    assert (model.bits(tokens, Method(0, window=1)) - expected).abs().max() > 0.1


@pytest.mark.parametrize("method", [Method(4, 6), Method(4, 6, means=True), Method(0, 3)], ids=lambda m: m.name)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_what_a_token_sees(method, offset):
    """Against a loop over tokens that gathers the keys and values of each."""
    q, k, v = torch.randn(3, 2, LENGTH, 8, generator=torch.Generator().manual_seed(1))
    ends = [] if method.chunk == 0 else [s for s in range(LENGTH) if (s + 1 + offset) % method.chunk == 0]
    found = attend(q, k, v, method, offset, THETA)
    for t in range(LENGTH):
        keys, values, places = [], [], []
        for s in sorted({0, *ends}):
            if s < t - method.window:
                first = s if s == 0 or not method.means else max(1, s - method.chunk + 1)
                keys.append(k[:, first : s + 1].mean(1))
                values.append(v[:, first : s + 1].mean(1))
                places.append(s)
                if not method.means:
                    keys[-1], values[-1] = k[:, s], v[:, s]
        for s in range(max(0, t - method.window), t + 1):
            keys.append(k[:, s])
            values.append(v[:, s])
            places.append(s)
        rotated = rotate(torch.stack(keys, 1), torch.tensor(places), THETA)
        query = rotate(q[:, t : t + 1], torch.tensor([t]), THETA)
        expected = scaled_dot_product_attention(query, rotated, torch.stack(values, 1))[:, 0]
        assert (found[:, t] - expected).abs().max() < 1e-5


def test_means_of_chunks():
    x = torch.arange(11.0).view(1, 11, 1)
    assert boundaries(11, 4, 1).tolist() == [0, 2, 6, 10]
    assert chunk_means(x, 4, 1).flatten().tolist() == [0, 1.5, 4.5, 8.5]


def test_a_mixer_passes_the_last_token_through():
    generator = torch.Generator().manual_seed(2)
    x = rms_norm(torch.randn(5, 1, 3, 24, generator=generator) + 1, [24])
    wanted = torch.randn(24, 24, generator=generator)
    positive = torch.full((24,), 0.1)
    assert (x @ positive > 0).all()
    mixer = pass_through(wanted, positive)
    error = x + mixer(x) - x @ wanted.T
    assert error.abs().max() < 1e-2
    error[..., :2, :].sum().backward()
    state_weights = mixer.in_proj.weight.grad[48 : 48 + mixer.state]
    assert state_weights.abs().max() > 0  # training can fill the state


def test_a_layers_maps_are_its_projections_for_all_query_heads(llama):
    model = Llama(llama, torch.float32)
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    for wanted, name in zip(model.layer_weights(1), ("k_proj", "v_proj"), strict=True):
        expected = model.linear(model.norm(h, "layers.1.input_layernorm"), f"layers.1.self_attn.{name}")
        found = (model.norm(h, None) @ wanted.T).unflatten(-1, (4, 8))
        for head in range(4):
            assert (found[:, head] - expected.unflatten(-1, (2, 8))[:, head // 2]).abs().max() < 1e-4
