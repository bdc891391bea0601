"""The studies that compute attention themselves: a token sees what the definition says."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import anchors
from benchmarks.anchors import BLOCK, OVERLAP, PAGE, STAR
from benchmarks.attamba.from_transformer import Method, attend, rotate
from starling.attention_backends.star.reference import star_mask

VOCABULARY, TOKENS = 100, 3 * BLOCK
LENGTH, THETA = 29, 1e4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=TOKENS, **sizes)
    config.initializer_range = 0.5  # so that what a token sees shows in its keys
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def kv(cache: DynamicCache) -> torch.Tensor:
    """(layers, 2, KV heads, tokens, D)."""
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


@pytest.mark.parametrize(
    ("name", "anchor", "overlap"),
    [(STAR, BLOCK, 0), (OVERLAP, PAGE, BLOCK - PAGE), ("no anchor", 0, 0), ("everything", TOKENS, 0)],
)
def test_what_blocks_behind_an_anchor_see(model, name, anchor, overlap):
    """`benchmarks.anchors` against one pass with the mask of Star Attention."""
    ids = Random(0).choices(range(VOCABULARY), k=TOKENS)
    fronts = anchors.anchor_variants(ids, constant=7, vocabulary=VOCABULARY, rng=Random(1))
    found = kv(anchors.prefill(model, ids, (fronts | {"everything": anchors.everything})[name], {}))
    sizes = {"block_size": BLOCK, "anchor_size": anchor, "overlap_size": overlap}
    mask = star_mask(TOKENS, **sizes, context_end=TOKENS)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([ids]), attention_mask=mask[None, None], past_key_values=cache)
    torch.testing.assert_close(found, kv(cache), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [Method(4, 6), Method(0, 3)], ids=lambda method: method.name)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_what_a_token_sees_whose_model_drops_keys(method, offset):
    """`benchmarks.attamba.from_transformer`: token 0, the last tokens of chunks, and the window."""
    q, k, v = torch.randn(3, 2, LENGTH, 8, generator=torch.Generator().manual_seed(1))
    ends = {0} | {s for s in range(LENGTH) if method.chunk and (s + 1 + offset) % method.chunk == 0}
    seen = [[s <= t and (s in ends or s >= t - method.window) for s in range(LENGTH)] for t in range(LENGTH)]
    places = torch.arange(LENGTH)
    expected = scaled_dot_product_attention(
        rotate(q, places, THETA), rotate(k, places, THETA), v, attn_mask=torch.tensor(seen)
    )
    assert (attend(q, k, v, method, offset, THETA) - expected).abs().max() < 1e-5
