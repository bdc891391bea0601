"""The user's own prompts as documents with a question: texts with a separator, or chats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starling.engine_ext.front.planning import only_token
from starling.lab.distillation.adapted_model import AdaptedModel
from starling.lab.evaluation.document_prompts import Asked, DocumentPrompt, Encoder, Tokens
from starling.lab.evaluation.prompts import OwnPrompt, read_own_prompts
from starling.lab.models import ModelError
from starling.scheduler.star.documents import NOT_ONE_TOKEN, positions_of

OWN = "own"
ALLOWED = "chats of three messages or more, or texts with --segments TEXT before each document and before the question"


def read_prompts(
    path: Path, segments: str | None, encoder: Encoder, answer_tokens: int, questions: int
) -> list[DocumentPrompt]:
    """The prompts of a file, in an order that does not follow the file's.

    Lines with the same documents are one prompt, so that a training step computes the documents once.

    Args:
        segments: the text of the token that starts a document; None: prompts are chats.
        answer_tokens: of an answer. Where a line has none, the answer is empty.
        questions: of a prompt, at most.

    Raises:
        ValueError: the file can't be read, or a prompt has no documents.
    """
    mark = None if segments is None else only_token(encoder.tokenizer, segments)
    if segments is not None and mark is None:
        raise ModelError(f"segments={segments!r} is refused: {NOT_ONE_TOKEN}")
    prompts = [prompt_of(own, line, mark, encoder, answer_tokens) for line, own in read_own_prompts(path)]
    asked: dict[tuple[Tokens, tuple[Tokens, ...]], list[Asked]] = {}
    for prompt in prompts:
        asked.setdefault((prompt.head, prompt.documents), []).extend(prompt.asked)
    contexts = [*asked.items()]
    random.Random(OWN).shuffle(contexts)
    return [
        DocumentPrompt(OWN, head, documents, tuple(every[first : first + questions]))
        for (head, documents), every in contexts
        for first in range(0, len(every), questions)
    ]


def with_answers(prompt: DocumentPrompt, model: AdaptedModel, tokens: int, end: int | None) -> DocumentPrompt:
    """The prompt, with the model's own answers by dense attention where it has none.

    Args:
        tokens: of an answer, which ends earlier behind an ``end`` of the model's.
    """
    open_ones = [asked.question for asked in prompt.asked if not asked.answer]
    if not open_ones:
        return prompt
    answers = iter(model.answers(prompt.context, open_ones, tokens, end))
    asked = [one if one.answer else replace(one, answer=next(answers)) for one in prompt.asked]
    return replace(prompt, asked=tuple(asked))


def prompt_of(own: OwnPrompt, line: int, mark: int | None, encoder: Encoder, answer_tokens: int) -> DocumentPrompt:
    """A line of the user's file (raises ModelError: it has no documents)."""
    if own.messages is not None:
        ids, starts = chat_segments(own.messages, encoder)
    else:
        ids = list(encoder.tokenizer(own.prompt)["input_ids"])
        starts = [] if mark is None else positions_of(mark, ids)
    if len(starts) < 2:
        raise ModelError(f"line {line} is refused: it has no documents before its question. Allowed: {ALLOWED}")
    pieces = [tuple(ids[start:stop]) for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    text = ", ".join(own.references)
    goes_on = own.prompt is not None and not own.prompt[-1:].isspace()
    answer = encoder.encode(f" {text}" if goes_on else text)[:answer_tokens] if text else ()
    return DocumentPrompt(OWN, tuple(ids[: starts[0]]), tuple(pieces[:-1]), (Asked(pieces[-1], answer),))


def chat_segments(messages: Sequence[Any], encoder: Encoder) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and where each message but the first starts, as a server with star_segments=auto has them.

    Raises:
        ModelError: there is no chat template, or it does not render the first messages as the chat's beginning.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template. Allowed: texts with --segments TEXT")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: Tokens = tuple(encoded["input_ids"])
    token_at = {start: index for index, (start, _) in reversed([*enumerate(encoded["offset_mapping"])])}
    starts = []
    for number in range(1, len(messages)):
        before = tokenizer.apply_chat_template(list(messages[:number]), tokenize=False)
        if text.startswith(before) and len(before) in token_at:
            starts.append(token_at[len(before)])
    return list(ids), starts
