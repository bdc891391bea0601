"""The constructed model finds what Star Attention's definition says, and docs/star-accuracy.md has the results."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import retrieval
from benchmarks.report import RESULTS
from starling.attention_backends.star.reference import star_mask

TOKENS = 1024
PAPER = {"block_size": TOKENS // 8, "anchor_size": TOKENS // 8, "overlap_size": 0, "context_end": 960}
OVERLAP = PAPER | {"anchor_size": 16, "overlap_size": TOKENS // 8 - 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = retrieval.make_retrieval_model(tmp_path_factory.mktemp("retrieval"), 131073)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def answer(model, ids, mask, positions):
    """The token after a prompt whose tokens have any positions."""
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(
            torch.tensor([ids]),
            attention_mask=bias[None, None],
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=1,
        ).logits
    return int(logits[0, -1].argmax())


@pytest.mark.parametrize(("sizes", "lost"), [(None, 0), (OVERLAP, 0), (PAPER, 4)], ids=["dense", "overlap", "A = B"])
def test_answers_are_right_where_the_value_sees_its_key(model, sizes, lost):
    """Of the eight values that start a 16th, five start an eighth. One of these follows the anchor."""
    ids, needles = retrieval.make_context(TOKENS)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = star_mask(TOKENS, **sizes) if sizes else causal
    found = [retrieval.is_found(needle.position, sizes) for needle in needles]
    answers = [answer(model, [*ids[:-1], needle.key], mask, list(range(TOKENS))) for needle in needles]
    assert [token == needle.value for token, needle in zip(answers, needles, strict=True)] == found
    assert found.count(False) == lost


def test_a_needle_is_found_at_any_distance(model):
    """Two pieces of a prompt of 131,072 tokens: its first tokens, and its end."""
    ids, needles = retrieval.make_context(TOKENS)
    half = TOKENS // 2
    positions = [*range(half), *range(131072 - half, 131072)]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for needle in needles:
        if needle.position != half:  # its key is in the other piece
            assert answer(model, [*ids[:-1], needle.key], mask, positions) == needle.value


def test_needles_are_spread_over_the_prompt():
    ids, needles = retrieval.make_context(131072)
    assert len({needle.key for needle in needles}) == len(needles) == 40
    assert {needle.position * 32 // 131072 for needle in needles} == set(range(32))
    for needle in needles:
        assert ids[needle.position - 1 : needle.position + 1] == [needle.key, needle.value]
        assert ids.count(needle.key) == 1


def test_the_page_has_the_right_answers_of_the_results():
    result = json.loads((RESULTS / "retrieval.json").read_text())
    page = (RESULTS.parents[1] / "docs" / "star-accuracy.md").read_text(encoding="utf-8")
    assert all(row["as_expected"] == row["questions"] == 40 for row in result["rows"])
    default, *paper = (row["right"] for row in result["rows"] if row["plan"] != "dense")
    text = "{} right answers with the default plan, {}, {} and {} with A = B at n/4, n/8 and n/16."
    assert text.format(default, *paper) in page
