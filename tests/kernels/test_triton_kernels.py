"""The Triton kernels against the reference: under Triton's interpreter, or on a GPU where one is there.

The interpreter runs in a worker process: the rest of the suite must not see TRITON_INTERPRET. It rounds to bfloat16 by
cutting off, which costs up to the ulp that the bound allows; in float32 and float16 it is as exact as a GPU.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from tests.kernels.triton_jobs import Case, measure, start_worker

SECONDS = 60


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_worker) as pool:
        yield pool


# Rows: one that extends, one that decodes, one without keys, a whole prompt, one without queries, and one whose first
# queries stand before all keys (as in a context part that is shorter than the query part).
MIXED = Case((5, 1, 2, 33, 0, 4), (70, 90, 0, 33, 9, 3), 4, 2, 64, 64, 16)
DECODE = Case((1, 1, 1, 3), (1, 300, 0, 131), 4, 2, 64, 64, 16, splits=3)

CASES = {
    "mixed": MIXED,
    "not causal": replace(MIXED, causal=False),
    "window": replace(MIXED, window=7),
    "window of one": replace(MIXED, window=1),
    "window, not causal": replace(MIXED, window=20, causal=False),
    "softcap": replace(MIXED, softcap=2.0),
    "float16": replace(MIXED, dtype="float16"),
    "bfloat16": replace(MIXED, dtype="bfloat16", window=40, softcap=30.0),
    "head size 32, one head a KV head": replace(MIXED, heads=2, key_size=32, value_size=32, page=128),
    "head size 80, three heads a KV head": replace(MIXED, heads=3, kv_heads=1, key_size=80, value_size=80),
    "head sizes 96 and 48": replace(MIXED, key_size=96, value_size=48, page=24),
    "head size 160, eight heads a KV head": replace(MIXED, heads=8, kv_heads=1, key_size=160, value_size=160, page=32),
    "head size 256": replace(MIXED, heads=2, key_size=256, value_size=256, page=64),
    "heads first": replace(MIXED, order="heads first"),
    "gaps between pages": replace(MIXED, order="gaps"),
    "layout of the CPU backend": replace(MIXED, order="cpu"),
    "e4m3": replace(MIXED, dtype="float16", cache="float8_e4m3fn", k_scale=0.5, v_scale=3.0),
    "e5m2": replace(MIXED, dtype="float16", cache="float8_e5m2", k_scale=0.5, v_scale=3.0, softcap=5.0),
    "long": replace(MIXED, queries=(150,), keys=(400,), heads=2),
    "long, 70 queries of 8 heads": replace(MIXED, queries=(70,), keys=(200,), heads=8, kv_heads=1, window=65),
    "decode": DECODE,
    "decode, one split": replace(DECODE, splits=1),
    "decode, more splits than keys": replace(DECODE, splits=17, keys=(1, 150, 0, 5), heads=2),
    "decode, window": replace(DECODE, window=100),
    "decode, window, not causal": replace(DECODE, window=100, causal=False, splits=2),
    "decode, softcap, eight heads": replace(DECODE, heads=8, kv_heads=1, softcap=3.0),
    "decode, bfloat16": replace(DECODE, dtype="bfloat16", heads=2, key_size=128, value_size=96),
    "decode, e4m3": replace(DECODE, dtype="float16", cache="float8_e4m3fn", k_scale=2.0, v_scale=0.25),
    "decode, rows of many queries": replace(MIXED, heads=2, splits=4),
}


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    rows = draw.randint(1, 4)
    decode = draw.random() < 0.5
    queries = [draw.choice((1, 1, 2) if decode else (1, 7, 30, 65)) for _ in range(rows)]
    keys = [count + draw.choice((0, draw.randint(1, 150), draw.randint(1, 150))) for count in queries]
    for row in range(1, rows):
        empty = draw.choice((queries, keys, None, None))
        if empty:
            empty[row] = 0
    kv_heads = draw.choice((1, 2))
    dtype = draw.choice(("float32", "float16", "bfloat16"))
    return Case(
        tuple(queries),
        tuple(keys),
        kv_heads * draw.randint(1, 8 if decode else 4),
        kv_heads,
        draw.choice((32, 40, 64, 80, 96, 128)),
        draw.choice((32, 64, 72, 128)),
        draw.choice((16, 32, 48, 64, 128)),
        dtype=dtype,
        cache=draw.choice(("", "", "float8_e4m3fn", "float8_e5m2")) if dtype != "float32" else "",
        causal=draw.random() < 0.7,
        window=draw.choice((None, None, 1, 16, 77)),
        softcap=draw.choice((0.0, 0.0, 4.0)),
        k_scale=draw.choice((1.0, 0.7)),
        v_scale=draw.choice((1.0, 1.9)),
        order=draw.choice(("pages", "heads first", "gaps")),
        splits=draw.randint(1, 5) if decode else None,
    )


@pytest.mark.parametrize(
    ("case", "seed"),
    [pytest.param(case, 0, id=name) for name, case in CASES.items()]
    + [pytest.param(random_case(seed), seed, id=f"random {seed}") for seed in range(12)],
)
def test_kernel_is_the_reference(worker: ProcessPoolExecutor, case: Case, seed: int):
    errors = worker.submit(measure, case, seed).result(SECONDS)
    assert errors.in_place
    assert errors.empty
    assert errors.lse <= 1e-5
    assert errors.rms <= 1.1 * errors.sdpa_rms + errors.ulp
