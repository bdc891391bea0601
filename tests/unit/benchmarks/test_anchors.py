"""Blocks behind other tokens than the anchor: their KV, their number of keys, and the page's tables."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import anchors
from benchmarks.anchors import BLOCK, DENSE, OVERLAP, PAGE, STAR
from benchmarks.report import RESULTS
from starling.attention_backends.star.reference import star_mask

VOCABULARY, TOKENS = 100, 3 * BLOCK


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=TOKENS, **sizes)
    config.initializer_range = 0.5  # so that what a token sees shows in its keys
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def ids():
    return Random(0).choices(range(VOCABULARY), k=TOKENS)


def variants(ids):
    return anchors.anchor_variants(ids, constant=7, vocabulary=VOCABULARY, rng=Random(1))


def kv(cache: DynamicCache) -> torch.Tensor:
    """(layers, 2, KV heads, tokens, D)."""
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


def by_mask(model, ids, anchor: int, overlap: int) -> torch.Tensor:
    """The KV of one forward pass with Star Attention's mask."""
    sizes = {"block_size": BLOCK, "anchor_size": anchor, "overlap_size": overlap}
    mask = star_mask(len(ids), **sizes, context_end=len(ids))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([ids]), attention_mask=mask[None, None], past_key_values=cache)
    return kv(cache)


@pytest.mark.parametrize(
    ("name", "anchor", "overlap"), [(STAR, BLOCK, 0), (OVERLAP, PAGE, BLOCK - PAGE), ("no anchor", 0, 0)]
)
def test_blocks_behind_the_anchor_are_star_blocks(model, ids, name, anchor, overlap):
    found = kv(anchors.prefill(model, ids, variants(ids)[name], {}))
    torch.testing.assert_close(found, by_mask(model, ids, anchor, overlap), rtol=1e-3, atol=1e-3)


def test_all_blocks_in_front_are_dense_attention(model, ids):
    found = kv(anchors.prefill(model, ids, anchors.everything, {}))
    torch.testing.assert_close(found, by_mask(model, ids, TOKENS, 0), rtol=1e-3, atol=1e-3)


def test_each_variant_has_other_kv_behind_the_first_block(model, ids):
    """The last block differs between any two variants, and the first one never does."""
    found = {name: kv(anchors.prefill(model, ids, front_of, {})) for name, front_of in variants(ids).items()}
    for name, values in found.items():
        for other, others in found.items():
            if name < other:
                torch.testing.assert_close(values[..., :BLOCK, :], others[..., :BLOCK, :])
                assert (values - others)[..., -BLOCK:, :].abs().max() > 0.01, (name, other)


def test_variants_change_either_content_or_positions(ids):
    fronts = {name: front_of(2 * BLOCK) for name, front_of in variants(ids).items()}
    star = fronts[STAR]
    for name in ("anchor at the positions of the block before", "anchor at random positions"):
        assert fronts[name].ids == star.ids and fronts[name].positions != star.positions
        assert (
            list(fronts[name].positions) == sorted(set(fronts[name].positions))
            and max(fronts[name].positions) < 2 * BLOCK
        )
    shuffled = fronts["the anchor's tokens shuffled"]
    assert shuffled.ids != star.ids and sorted(shuffled.ids) == sorted(star.ids)
    for name in ("the anchor's tokens shuffled", "random tokens", "one token repeated"):
        assert fronts[name].ids != star.ids and fronts[name].positions == star.positions
    before = tuple(ids[BLOCK : 2 * BLOCK])
    assert fronts["the block before as anchor, at the anchor's positions"] == anchors.Front(before, star.positions)
    own = tuple(range(BLOCK, 2 * BLOCK))
    assert fronts["the block before as anchor, at its positions"] == anchors.Front(before, own)


@pytest.mark.parametrize("question", [1, PAGE - 1, PAGE, PAGE + 1])
def test_the_question_takes_the_place_of_other_keys(ids, question):
    asked = list(range(question))
    for front_of in anchors.question_variants(ids, asked).values():
        front = front_of(BLOCK)
        assert list(front.ids[-question:]) == asked
        assert front.positions == tuple(range(len(front.ids)))
        assert BLOCK - PAGE < len(front.ids) + front.overlap <= BLOCK


def test_rows_are_paired_with_dense_and_star():
    scores = {DENSE: [(-0.5, True)] * 12, STAR: [(-0.7, False)] * 12, OVERLAP: [(-0.6, True)] * 6 + [(-0.8, False)] * 6}
    rows = anchors.rows_of([scores, scores])
    assert rows[OVERLAP]["passcodes_over_dense"] == pytest.approx([-0.1] * 3)
    assert rows[OVERLAP]["two_facts_over_dense"] == pytest.approx([-0.3] * 3)
    assert rows[OVERLAP]["over_star"] == pytest.approx([0.0] * 3, abs=1e-9)
    assert (rows[OVERLAP]["passcodes_found"], rows[STAR]["passcodes_found"]) == (1, 0)


def test_the_tables_have_a_row_for_each_variant():
    for path in sorted(RESULTS.glob("anchors_*.json")):
        result = json.loads(path.read_text())
        first, second = (table.splitlines()[2:] for table in anchors.markdown(result).split("\n\n"))
        assert [row.split(" | ")[0][2:] for row in first] == [*result["rows"]]
        assert [row.split(" | ")[0][2:] for row in second] == [*result["question_rows"]]
