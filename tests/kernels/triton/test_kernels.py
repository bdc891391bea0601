"""The Triton kernels against the reference: on a GPU, or in Triton's interpreter where there is none.

The interpreter runs in a worker process, because the rest of the suite must not see TRITON_INTERPRET. It rounds to
bfloat16 by truncation, which costs up to the ulp that the bound allows. In float32 and float16 it is as exact as a GPU.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from starling.attention_backends.kernels.contract import Layout
from tests.kernels.cases import Case
from tests.kernels.triton.jobs import measure, start_worker

SECONDS = 600

# Rows: extend, decode, no keys, a whole prompt, no queries, and more queries than keys, so that the first see no key.
MIXED = Case((5, 1, 2, 33, 0, 4), (70, 90, 0, 33, 9, 3), 2, 2, 64, 64, layout=Layout.PAGES)
DECODE = Case((1, 1, 1, 3), (1, 300, 0, 131), 2, 2, 64, 64, layout=Layout.PAGES)
E4M3 = {"dtype": torch.float16, "cache_dtype": torch.float8_e4m3fn}
E5M2 = {"dtype": torch.float16, "cache_dtype": torch.float8_e5m2}

PREFILL = {
    "mixed": MIXED,
    "not causal": replace(MIXED, causal=False),
    "window": replace(MIXED, window=7),
    "window of one": replace(MIXED, window=1),
    "window, not causal": replace(MIXED, window=20, causal=False),
    "softcap": replace(MIXED, softcap=2.0),
    "float16": replace(MIXED, dtype=torch.float16),
    "bfloat16": replace(MIXED, dtype=torch.bfloat16, window=40, softcap=30.0),
    "head size 32, one head a KV head": replace(MIXED, group=1, key_size=32, value_size=32, page_size=128),
    "head size 80, three heads a KV head": replace(MIXED, kv_heads=1, group=3, key_size=80, value_size=80),
    "head sizes 96 and 48": replace(MIXED, key_size=96, value_size=48, page_size=24),
    "head size 160, eight heads a KV head": replace(
        MIXED, kv_heads=1, group=8, key_size=160, value_size=160, page_size=32
    ),
    "head size 256": replace(MIXED, kv_heads=1, key_size=256, value_size=256, page_size=64),
    "e4m3": replace(MIXED, **E4M3, k_scale=0.5, v_scale=3.0),
    "e5m2": replace(MIXED, **E5M2, k_scale=0.5, v_scale=3.0, softcap=5.0),
    "layout of the CPU backend": replace(MIXED, layout=Layout.CPU),
    "staircase": replace(MIXED, query_lens=(150, 7, 0), seq_lens=(40, 3, 2), causal=True, queries_per_key=8),
    "long": replace(MIXED, query_lens=(150,), seq_lens=(400,), group=1),
    "long, windowed": replace(MIXED, query_lens=(70,), seq_lens=(200,), kv_heads=1, group=8, window=65),
}
STRIDES = {
    "heads first": MIXED,
    "gaps": replace(MIXED, key_size=96, value_size=48),
}
SPLIT = {
    "decode": (DECODE, 3),
    "decode, one split": (DECODE, 1),
    "decode, more splits than keys": (replace(DECODE, group=1, seq_lens=(1, 150, 0, 5)), 17),
    "decode, window": (replace(DECODE, window=100), 3),
    "decode, window, not causal": (replace(DECODE, window=100, causal=False), 2),
    "decode, softcap, eight heads": (replace(DECODE, kv_heads=1, group=8, softcap=3.0), 3),
    "decode, staircase": (replace(DECODE, causal=True, query_lens=(3, 2, 1, 1), queries_per_key=4), 3),
    "decode, bfloat16": (replace(DECODE, kv_heads=1, dtype=torch.bfloat16, key_size=128, value_size=96), 3),
    "decode, e4m3": (replace(DECODE, **E4M3, k_scale=2.0, v_scale=0.25), 3),
    "decode, rows of many queries": (replace(MIXED, group=1), 4),
}


def random_job(seed: int) -> tuple[Case, int | None, str]:
    draw = random.Random(seed)
    decode = draw.random() < 0.5
    queries = [draw.choice((1, 1, 2) if decode else (1, 7, 30, 65)) for _ in range(draw.randint(1, 4))]
    keys = [count + draw.choice((0, draw.randint(1, 150), draw.randint(1, 150))) for count in queries]
    for row in range(1, len(queries)):
        empty = draw.choice((queries, keys, None, None))
        if empty:
            empty[row] = 0
    dtype = draw.choice((torch.float32, torch.float16, torch.bfloat16))
    eight_bits = draw.choice((None, None, torch.float8_e4m3fn, torch.float8_e5m2))
    case = Case(
        tuple(queries),
        tuple(keys),
        draw.choice((1, 2)),
        draw.randint(1, 8 if decode else 4),
        draw.choice((32, 40, 64, 80, 96, 128)),
        draw.choice((32, 64, 72, 128)),
        draw.choice((16, 32, 48, 64, 128)),
        layout=Layout.PAGES,
        causal=draw.random() < 0.7,
        queries_per_key=draw.choice((1, 1, 4)),
        window=draw.choice((None, None, 1, 16, 77)),
        softcap=draw.choice((0.0, 0.0, 4.0)),
        dtype=dtype,
        cache_dtype=None if dtype is torch.float32 else eight_bits,
        k_scale=draw.choice((1.0, 0.7)),
        v_scale=draw.choice((1.0, 1.9)),
        seed=seed,
    )
    return case, draw.randint(1, 5) if decode else None, draw.choice(("pages", "heads first", "gaps"))


JOBS = (
    {name: (case, None, "pages") for name, case in PREFILL.items()}
    | {name: (case, None, name) for name, case in STRIDES.items()}
    | {name: (case, splits, "pages") for name, (case, splits) in SPLIT.items()}
    | {f"random {seed}": random_job(seed) for seed in range(12)}
)


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_worker) as pool:
        yield pool


@pytest.mark.parametrize(("case", "splits", "strides"), JOBS.values(), ids=JOBS)
def test_kernel_is_the_reference(worker: ProcessPoolExecutor, case: Case, splits: int | None, strides: str):
    errors = worker.submit(measure, case, splits, strides).result(SECONDS)
    assert errors.empty
    assert errors.lse <= 1e-5
    assert errors.rms <= 1.1 * errors.sdpa_rms + errors.ulp
