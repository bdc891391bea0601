"""The prompts of the engine checks: the same on every machine, for a vocabulary of any size."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

PAGE_SIZE, BLOCK, QUERY, LENGTH, NEW = 32, 128, 37, 600, 16
STEP_TOKENS = 256  # a step cuts prompts anywhere
NUM_PAGES, MAX_LENGTH = 150, 2048
GROWTH, PREEMPTED = 80, 8  # eight prompts fit in the cache, and their outputs do not
PREEMPTED_LENGTH = 550
LONGEST = max(LENGTH + NEW, PREEMPTED_LENGTH + GROWTH)
"""Tokens of the longest prompt with its output: below this ``max_model_len`` the engine checks can't run."""
EDITED_BLOCK = 2
STAR = {"star": "on", "star_block_size": BLOCK, "star_overlap_size": 0, "star_query_tokens": QUERY}
ONE_BLOCK = STAR | {"star_block_size": 1024}
CONTEXT = LENGTH - QUERY
DENSE_HEADS = 0.5
DOCUMENTS = (130, 45, 64, 201)  # tokens
"""Documents, of which some end on a KV page and some do not."""

Prompt = dict[str, Any]


def make_prompt(seed: int, length: int, vocabulary: int, **fields: Any) -> Prompt:
    """Return random tokens, and by default ``NEW`` tokens of output."""
    draw = random.Random(seed)
    return {"ids": [draw.randrange(vocabulary) for _ in range(length)], "max_tokens": NEW} | fields


def plain_batches(vocabulary: int) -> dict[str, list[Prompt]]:
    """Return dense prompts that both a plain and an activated engine run.

    They run several together, and one alone and beside the others.
    """
    off = [make_prompt(seed, length, vocabulary, cold=True) for seed, length in enumerate((LENGTH, 1, 33, 300, 20))]
    prompt = make_prompt(1, LENGTH, vocabulary, prompt_logprobs=True)
    return {"off": off, "dense": [prompt], "dense, beside": [*off, prompt]}


WITH_DOCUMENTS = {"star_segments": "auto"}
"""The options of an engine that is made for documents; each prompt says where its own start."""


def document_batches(vocabulary: int) -> dict[str, list[Prompt]]:
    """Return prompts of the same documents in two orders."""
    documents = [make_prompt(300 + length, length, vocabulary)["ids"] for length in DOCUMENTS]
    question = make_prompt(2, QUERY, vocabulary)["ids"]

    def prompt(order: list[list[int]], **fields: Any) -> Prompt:
        ids = [token for document in order for token in document] + question
        starts = [0, *accumulate(map(len, order))]
        return {"ids": ids, "max_tokens": NEW, "star": {"star": "on", "star_segments": starts}} | fields

    return {
        "documents": [prompt(documents, prompt_logprobs=True)],
        "computed": [prompt(documents)],
        "reordered": [prompt(documents[::-1])],
        "reordered, cold": [prompt(documents[::-1], cold=True)],
    }


def library_batches(vocabulary: int) -> dict[str, list[Prompt]]:
    """Return the documents of ``document_batches`` again, behind prompts that take every page of the KV cache."""
    (documents,) = document_batches(vocabulary)["computed"]
    count = -(-NUM_PAGES // (LENGTH // PAGE_SIZE))  # a page that is not full is used again at once
    others = [make_prompt(400 + seed, LENGTH, vocabulary, max_tokens=2, bare=True) for seed in range(count)]
    return {"other prompts": others, "stored": [documents]}


def head_batches(vocabulary: int) -> dict[str, list[Prompt]]:
    """Return a prompt with half of its KV heads dense: alone, beside one without such heads, and cached."""
    prompt = make_prompt(1, LENGTH, vocabulary, star=STAR | {"star_dense_heads": DENSE_HEADS})
    other = make_prompt(4, LENGTH, vocabulary, star=STAR | {"star_dense_heads": 0}, cold=True)
    return {
        "heads": [prompt | {"prompt_logprobs": True}],
        "heads, alone": [prompt | {"cold": True}],
        "heads, beside": [other, prompt | {"cold": True}],
        "heads, computed": [prompt],
        "heads, cached": [prompt],
    }


def star_batches(vocabulary: int, num_decodes: int) -> dict[str, list[Prompt]]:
    """Return the batches of an activated engine, in the order in which they have to run.

    Args:
        num_decodes: prompts that decode beside a star prompt.
    """
    prompt = make_prompt(1, LENGTH, vocabulary)
    star = prompt | {"star": STAR}
    position = EDITED_BLOCK * BLOCK + BLOCK // 2
    ids = list(prompt["ids"])
    ids[position] = (ids[position] + 1) % vocabulary
    edited = star | {"ids": ids}
    decodes = [make_prompt(100 + seed, 20, vocabulary, max_tokens=2 * NEW, cold=True) for seed in range(num_decodes)]
    growing = [
        make_prompt(
            200 + seed, PREEMPTED_LENGTH, vocabulary, cold=True, max_tokens=GROWTH, star=STAR if seed % 2 else None
        )
        for seed in range(PREEMPTED)
    ]
    return plain_batches(vocabulary) | {
        "star": [star | {"prompt_logprobs": True}],
        "one block": [prompt | {"star": ONE_BLOCK, "prompt_logprobs": True}],
        "alone": [star | {"cold": True}],
        "beside": [*decodes, star | {"cold": True}],
        "warm": [star],
        "edited": [edited],
        "edited, cold": [edited | {"cold": True}],
        "calm 1": growing[: PREEMPTED // 2],
        "calm 2": growing[PREEMPTED // 2 :],
        "preempted": growing,
    }
