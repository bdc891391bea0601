"""Repair of documents: all pages are dense attention, none are documents as the engine computes them."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from benchmarks.approximations import MaskedAttention
from benchmarks.repair import __main__ as repair
from benchmarks.repair import kv, prompts, selection
from starling.config.head_scores import HeadScores

VOCABULARY = 100
SCORES = HeadScores(scores=((0.1, 0.4), (0.2, 0.3), (0.0, 0.0)))
SHARES = (0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def attention():
    attention = MaskedAttention()
    AttentionInterface.register("by_mask", attention)
    AttentionMaskInterface.register("by_mask", sdpa_mask)
    return attention


@pytest.fixture(scope="module")
def model(attention):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    config.initializer_range = 0.5  # so that what a token sees shows in its keys
    return LlamaForCausalLM._from_config(config, attn_implementation="by_mask").eval()


@pytest.fixture(scope="module")
def prompt():
    rng = Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(VOCABULARY), k=count))

    return prompts.Prompt("code", ids(20), (ids(30), ids(40), ids(35)), ids(10), ids(3))


def logprobs(model, attention, prompt, mask) -> torch.Tensor:
    """(answer tokens, vocabulary) of one pass over the whole prompt."""
    ids = [*prompt.context, *prompt.question, *prompt.answer[:-1]]
    whole = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    whole[: len(mask), : len(mask)] = mask
    attention.mask = lambda layer, query, key: whole
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), logits_to_keep=len(prompt.answer)).logits[0]
    attention.mask = None
    return logits.log_softmax(-1)


def chosen_documents(prompt, first: int) -> torch.Tensor:
    return prompt.number >= first


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_repair_of_all_pages_is_dense_attention(model, attention, prompt):
    layers = kv.document_kv(model, attention, prompt)
    found = kv.answered(model, attention, prompt, layers, chosen_documents(prompt, 1))
    dense = kv.dense_kv(model, attention, prompt)
    for (keys, values), (right_keys, right_values) in zip(found.layers, dense, strict=True):
        assert_near(keys, right_keys)
        assert_near(values, right_values)
    causal = torch.ones(len(prompt.context), len(prompt.context), dtype=torch.bool).tril()
    assert_near(found.logprobs, logprobs(model, attention, prompt, causal))
    assert kv.deviation(found.layers, dense).max() < 1e-4 < kv.deviation(layers, dense)[1:].mean()


def test_the_first_document_is_dense_without_repair(model, attention, prompt):
    """So it has no pages to choose."""
    layers = kv.document_kv(model, attention, prompt)
    found = kv.answered(model, attention, prompt, layers, chosen_documents(prompt, 2))
    assert kv.deviation(found.layers, kv.dense_kv(model, attention, prompt)).max() < 1e-4
    assert {int(prompt.number[page.start]) for page in selection.pages_of(prompt)} == {2, 3}


def test_no_repair_is_documents_by_themselves(model, attention, prompt):
    """One pass in which each document stands right behind the head, with its keys turned by the rest of the model."""
    layers = kv.document_kv(model, attention, prompt)
    found = kv.answered(model, attention, prompt, layers, chosen_documents(prompt, 4))
    for (keys, values), (same_keys, same_values) in zip(found.layers, layers, strict=True):
        assert torch.equal(keys, same_keys) and torch.equal(values, same_values)
    head, document = len(prompt.head), prompt.documents[2]
    alone = dataclasses.replace(prompt, documents=(document,))
    start = prompt.starts[2]
    for number, (keys, values) in enumerate(kv.dense_kv(model, attention, alone)):
        by = torch.full((len(document),), start - head)
        assert_near(layers[number][0][:, :, start:], kv.turned(model, keys[:, :, head:], by))
        assert_near(layers[number][1][:, :, start:], values[:, :, head:])


def test_turned_keys_are_those_of_other_positions(model, attention):
    ids, places = [1, 2, 3], torch.arange(3)
    one_layer = kv.computed(model, attention, ids, places, [], lambda *_: torch.eye(3, dtype=torch.bool))[1]
    moved = kv.computed(model, attention, ids, places + 7, [], lambda *_: torch.eye(3, dtype=torch.bool))[1]
    assert_near(kv.turned(model, one_layer[0][0], torch.full((3,), 7)), moved[0][0])


def test_dense_heads_are_between(model, attention, prompt):
    """All heads: dense attention. None: the mask of documents, at the places of the prompt."""
    heads = set(SCORES.order)
    none, dense = torch.zeros(len(prompt.context), dtype=torch.bool), kv.dense_kv(model, attention, prompt)
    everything = kv.dense_heads_kv(model, attention, prompt, heads)
    assert kv.deviation(everything, dense).max() < 1e-4
    layers = kv.dense_heads_kv(model, attention, prompt, set())
    found = kv.answered(model, attention, prompt, layers, none)
    assert_near(found.logprobs, logprobs(model, attention, prompt, kv.document_mask(prompt)))


def test_attention_is_the_questions_alone(model, attention, prompt):
    layers = kv.document_kv(model, attention, prompt)
    other = dataclasses.replace(prompt, answer=tuple(99 - token for token in prompt.answer))
    chosen = chosen_documents(prompt, 3)
    first, second = (kv.answered(model, attention, one, layers, chosen).attention for one in (prompt, other))
    assert_near(first, second)
    assert first.shape == (3, 2, len(prompt.context))
    assert (first > 0).all() and (first.sum(-1) < 1).all()


@pytest.mark.parametrize("name", selection.RULES)
@pytest.mark.parametrize("share", SHARES)
def test_a_selection_keeps_to_its_share(model, attention, prompt, name, share):
    repairs, rule = repair.Repairs(model, attention, prompt, SCORES, "seed"), selection.RULES[name]
    unrepaired = repairs.answer(kv.document_kv(model, attention, prompt), repairs.none)
    found, work = repairs.repaired(rule, repairs.facts(unrepaired), unrepaired, share)
    whole = selection.documents_work(prompt).tokens
    again = work.tokens - rule.passes * rule.cost(prompt, 3).tokens
    changed = [
        (keys != old).any(-1).any(1).sum() for (keys, _), (old, _) in zip(found.layers, unrepaired.layers, strict=True)
    ]
    assert share * whole - rule.passes * selection.PAGE < again <= share * whole
    assert max(changed) <= again + 1e-6


def test_the_best_pages_are_chosen_until_the_next_does_not_fit(prompt):
    pages = selection.pages_of(prompt)
    assert [(page.start, page.end, page.index) for page in pages] == [
        *((50, 66, 0), (66, 82, 1), (82, 90, 2)),
        *((90, 106, 0), (106, 122, 1), (122, 125, 2)),
    ]
    scores = torch.tensor([0.0, 3.0, 5.0, 4.0, 9.0, 1.0])
    chosen = selection.choose(scores, pages, 125, 40)
    assert chosen.nonzero()[:, 0].tolist() == [*range(82, 122)]
    assert selection.choose(scores, pages, 125, 39).sum() == 24
    assert selection.choose(scores, pages, 125, 0).sum() == 0


def facts(prompt) -> selection.Facts:
    """Retrieval heads that look at the last page, all heads at the one before, and KV that deviates in the second."""
    heads, off = torch.zeros(2, 2, 125), torch.zeros(2, 125)
    heads[1, 0, 122:], heads[0, :, 106:122], heads[1, 1, 66:82] = 0.4, 0.5, 0.1
    off[1, 66:82], off[0, 90:106] = 2.0, 8.0
    return selection.Facts(selection.pages_of(prompt), heads, off, {(1, 0)}, "seed")


@pytest.mark.parametrize(
    ("rule", "first"),
    [
        (selection.by_attention, [4]),
        (selection.by_retrieval_heads, [5]),
        (selection.by_place, [0, 3]),
        (selection.by_heads_and_place, [5, 0, 3]),
        (selection.by_second_layer, [1]),
        (selection.by_deviation, [3, 1]),
        (selection.by_attended_deviation, [1]),
    ],
)
def test_rules_choose_by_what_they_say(prompt, rule, first):
    order = selection.ranks(rule(facts(prompt))).argsort().tolist()
    assert [page for page in order if page in first][: len(first)] == first and order[0] == first[0]


def test_every_selection_is_measured_and_has_a_row(model, attention, prompt):
    found = dict(repair.Repairs(model, attention, prompt, SCORES, "seed").measured(SHARES))
    again = dict(repair.Repairs(model, attention, prompt, SCORES, "seed").measured([0.2]))
    assert found["random", 0.2] == again["random", 0.2]
    assert found[repair.DENSE, 1.0].kl == pytest.approx(0, abs=1e-5)
    assert (found[repair.DENSE, 1.0].tokens, found[repair.DENSE, 1.0].keys) == (1, 1)
    assert found[repair.DENSE_HEADS, 1.0].keys < 1
    result = repair.result_of("tiny", 130, [prompt, prompt], [found, found])
    table = repair.markdown(result).splitlines()
    assert len(table) == 2 + len(selection.RULES) + 4
    assert len({line.count("|") for line in table}) == 1
    assert result["rows"][1]["loss_left"] == pytest.approx([1, 1, 1])


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(map(ord, text))}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


@pytest.mark.parametrize("task", prompts.TASK_NAMES)
def test_documents_have_natural_borders(task):
    tokenizer = Letters()
    prompt = prompts.make_prompt(task, 0, 6000, tokenizer)
    assert prompt == prompts.make_prompt(task, 0, 6000, tokenizer) != prompts.make_prompt(task, 1, 6000, tokenizer)
    texts = ["".join(map(chr, document)) for document in prompt.documents]
    start = {"code": "# file: ", "nth_note": "Note about "}.get(task, " ")
    assert len(texts) > 2 and all(text.startswith(start) for text in texts[1:])
    assert all(len(text) >= prompts.LEAST_TOKENS for text in texts[:-1])
    assert 5000 < len(prompt.context) + len(prompt.question) <= 6000
    assert [chr(prompt.context[start]) for start in prompt.starts] == [text[0] for text in texts]
    question = "".join(map(chr, prompt.question))
    assert question.startswith("\n\n") and "<assistant>" in question and "DOCUMENTS" not in question
