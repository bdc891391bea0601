"""Prompts of documents: the same text as passages of one message, behind a token each, or as a message each."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from benchmarks.random_llama import CHAT_TEMPLATE, byte_tokenizer
from starling.lab.evaluation.document_prompts import FILE_MARKS, DocumentPrompt, Encoder, Shape, Style, make_prompt

STRICT = "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHAT_TEMPLATE


def encoder_of(template: str | None = CHAT_TEMPLATE, mark: str | None = None) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if mark:
        tokenizer.add_tokens([AddedToken(mark, special=True)])
    return Encoder(tokenizer)


def prompt_of(encoder: Encoder, shape: Shape) -> DocumentPrompt:
    return make_prompt("code", "name", 4000, encoder, Style("Read.", shape=shape))


def texts(encoder: Encoder, prompt: DocumentPrompt) -> tuple[str, list[str], str]:
    decode = encoder.tokenizer.decode
    return decode(prompt.head), [decode(document) for document in prompt.documents], decode(prompt.question)


def test_a_document_is_a_passage_a_marked_text_or_a_message():
    encoder = encoder_of(mark=FILE_MARKS[1])
    head, passages, question = texts(encoder, prompt_of(encoder, "passages"))
    assert head.startswith("system: Read.\nuser: ") and question.startswith("\n\n")
    _, marked, _ = texts(encoder, prompt_of(encoder, "marked"))
    assert all(text.startswith(FILE_MARKS[1]) for text in marked)
    head, messages, question = texts(encoder, prompt_of(encoder, "messages"))
    assert head.startswith("system: Read.\n\n") and "user:" not in head
    assert all(text.startswith("user: ") and text.endswith("\n") for text in messages)
    assert question.startswith("user: ") and "\nassistant:" in question
    assert messages[0].removeprefix("user: ").removesuffix("\n") == passages[0]
    assert marked[0].removeprefix(FILE_MARKS[1]) == passages[0]


@pytest.mark.parametrize(("template", "shape"), [(None, "messages"), (STRICT, "messages"), (CHAT_TEMPLATE, "marked")])
def test_a_shape_that_a_model_has_not_is_passages(template, shape):
    encoder = encoder_of(template)
    assert prompt_of(encoder, shape) == prompt_of(encoder, "passages")
