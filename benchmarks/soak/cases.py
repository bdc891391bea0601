"""Prompts with options, each of which has one right answer: greedy, dense or star. One table for HTTP and gRPC."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

PAGE_SIZE = 32
SEGMENT_TOKEN, SEGMENT_TEXT = 256, "<|end|>"
QUERY = {"star": "on", "star_query_tokens": 40}
BLOCKS = QUERY | {"star_block_size": 128}
MESSAGES = {"star": "on", "star_segments": "auto"}
EDITABLE = BLOCKS | {"star_anchor_size": 128}


@dataclass(frozen=True)
class Case:
    """A prompt and its options.

    Attributes:
        prompt: token ids.
        star: options by their HTTP names; empty for dense attention.
        max_tokens: output tokens, unless ``form`` ends the output.
        form: the field ``structured_outputs`` of gRPC, or None for any output.
    """

    name: str
    prompt: tuple[int, ...]
    star: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 8
    form: dict[str, Any] | None = None


def random_ids(seed: str, length: int) -> tuple[int, ...]:
    """Return the token ids of bytes, the same for the same seed."""
    return tuple(random.Random(seed).choices(range(3, 250), k=length))


def random_text(seed: str, length: int) -> str:
    """Return small letters, the same for the same seed."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=length))


def segmented(variant: int, seed: str) -> tuple[int, ...]:
    """Return five documents, of which the third has a length of its own in each variant, and a query."""
    lengths = [100, 150, 90 + 7 * variant, 120, 80]
    documents = [(SEGMENT_TOKEN, *random_ids(f"{seed} {index}", length)) for index, length in enumerate(lengths)]
    return sum(documents, ()) + random_ids(f"{seed} query", 40)


def edited(variant: int, seed: str) -> tuple[int, ...]:
    """Return a prompt of eight star blocks, one token of which differs in each variant."""
    ids = list(random_ids(seed, 8 * 128 + 40))
    ids[(variant + 1) * 128 + 50] = 3 + variant
    return tuple(ids)


def spread_of(replicas: int) -> dict[str, Any]:
    """Return star options of a prompt that is split over a server's replicas."""
    return BLOCKS | {"star_replicas": replicas}


def make_cases(replicas: int, seed: str = "") -> list[Case]:
    """Make the cases for a server with this number of replicas.

    Args:
        seed: another seed gives other prompts.
    """
    long: dict[str, dict[str, Any]] = {
        "dense": {},
        "anchor": BLOCKS | {"star_anchor_size": 64},
        "anchor of a block": BLOCKS,
        "no anchor": BLOCKS | {"star_anchor_size": 0},
        "overlap": BLOCKS | {"star_overlap_size": 64},
        "dense heads": BLOCKS | {"star_dense_heads": 0.25},
        "dense heads, overlap": BLOCKS | {"star_overlap_size": 64, "star_dense_heads": 0.5},
        "quality": QUERY | {"star_quality": "fast"},
        "number of blocks": QUERY | {"star_block_size": "n/6"},
        "auto": BLOCKS | {"star": "auto", "star_min_tokens": 500},
    }
    forms: dict[str, dict[str, Any]] = {
        "regex": {"regex": "(ab|cd){3}"},
        "choices": {"choices": ["yes", "no"]},
        "schema": {"json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    }
    cases = [Case(f"short {i}", random_ids(f"{seed}short {i}", 30 + 9 * i), max_tokens=24) for i in range(4)]
    cases += [Case(name, random_ids(f"{seed}long", 1000), star) for name, star in long.items()]
    cases += [Case(f"edited {i}", edited(i, f"{seed}edited"), EDITABLE) for i in range(4)]
    for i in range(6):
        prompt = segmented(i, f"{seed}segments")
        offsets = [index for index, token in enumerate(prompt) if token == SEGMENT_TOKEN]
        cases.append(Case(f"documents {i}", prompt, QUERY | {"star_block_size": 128, "star_segments": offsets}))
    by_token = QUERY | {"star_block_size": 128, "star_segments": SEGMENT_TEXT}
    cases.append(Case("documents by a token", segmented(0, f"{seed}segments by a token"), by_token))
    for name, form in forms.items():
        prompt = random_ids(f"{seed}{name}", 300)
        cases += [Case(name, prompt, form=form, max_tokens=40), Case(f"{name}, star", prompt, BLOCKS, 40, form)]
    spread = spread_of(replicas)
    for i in range(4 if replicas > 1 else 0):
        prompt = random_ids(f"{seed}spread {i}", 12 * 128 + 40 + i)
        cases.append(Case(f"spread {i}", prompt, spread))
        cases.append(Case(f"shards {i}", prompt, spread | {"star_shards": "on"}))
    return cases
