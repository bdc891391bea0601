"""Run in a process of its own: counts the kernels of Starling's that steps over documents compile after a warm-up.

vLLM's own builders and implementations run; Triton neither compiles nor runs a kernel. Prints a JSON line.
"""

from __future__ import annotations

import json
import os
import random

from tests.gpu_contract.cuda_platform import use_cuda_platform

PLATFORM = use_cuda_platform()

import torch  # noqa: E402

from starling.attention_backends.kernels import contract  # noqa: E402
from starling.attention_backends.kernels.triton import paged  # noqa: E402
from starling.attention_backends.kernels.triton.paged import MAX_QUERIES_PER_DECODE_ROW  # noqa: E402
from starling.attention_backends.star.gpu_impl import warm_up  # noqa: E402
from starling.scheduler.planning.plan import StarPlan  # noqa: E402
from tests.gpu_contract import kernels  # noqa: E402
from tests.gpu_contract.cases import Case, Request, numbers  # noqa: E402
from tests.gpu_contract.engine import LayerGroup, make_config, run_case  # noqa: E402
from tests.kernels.compiles import count_compiles  # noqa: E402

PAGE_SIZE, KV_HEADS, GROUP, STEPS = 16, 2, 4, 40


def random_request(draw: random.Random, at_least: int, at_most: int) -> Request:
    """A decode, or some tokens, of a prompt over documents, or of a dense one."""
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(2, 6))]
    if draw.random() < 0.5:
        lengths = [paged.MIN_KEYS_PER_SPLIT + 1, lengths[0]]  # one whose keys may be divided
    blocks, start = [], 0
    for length in lengths:
        blocks.append((start, start + length))
        start += -(-length // PAGE_SIZE) * PAGE_SIZE
    plan = StarPlan(64, 0, 0, start, start + 40, documents=tuple(blocks))
    end = start + draw.randint(at_least, 60)
    queries = max(at_least, draw.choice((1, 1, 1, draw.randint(1, at_most))))
    return Request(max(start, end - queries), end, plan if draw.random() < 0.7 else None)


def random_case(seed: int) -> Case:
    """A step: of decodes alone, of rows of many tokens, of rows of few, or of all kinds; some have many rows."""
    draw = random.Random(seed)
    bounds = {0: (MAX_QUERIES_PER_DECODE_ROW + 1, 30), 1: (1, 1), 2: (2, MAX_QUERIES_PER_DECODE_ROW), 3: (1, 30)}
    requests = [random_request(draw, *bounds[seed % 4]) for _ in range(draw.choice((1, 2, 5, 33, 220)))]
    return Case(tuple(requests), PAGE_SIZE, PAGE_SIZE, "LBNHC", KV_HEADS, GROUP, seed=seed)


def main() -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    torch.set_num_threads(1)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    kernels.install_flash_attention()
    # CPU tensors are here what a GPU's are.
    contract.uses_triton = lambda device: True
    paged.multiprocessors = lambda device: 132
    compiled = count_compiles()
    if os.environ.get("WARM_UP") != "0":
        case = random_case(0)
        group = LayerGroup(case, FlashAttentionBackend, make_config(case), numbers(case, False), 0, by_parts=True)
        group.layer.kv_cache = group.cache
        warm_up([group.layer])
    warmed, rerotated = dict(compiled), 0
    for seed in range(STEPS):
        case = random_case(seed)
        _, rows = run_case(case, FlashAttentionBackend, numbers(case, False), by_parts=True)
        rerotated += rows is not None and rows.rerotated is not None
    found = {name: compiled[name] - warmed.get(name, 0) for name in compiled}
    print(json.dumps({"warmed": warmed, "later": found, "rerotated": rerotated}))
