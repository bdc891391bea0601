"""Page keys: equal exactly where the page's KV is."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

from attention_backends.star.reference import star_mask
from engine_ext import compat
from scheduler.cache_keys import star_page_key
from scheduler.plan import PLAN_KEY, StarPlan
from scheduler.star_scheduler import page_key

PAGE = 4


@pytest.fixture(scope="module", autouse=True)
def hashing():
    compat.add_page_key(page_key)
    compat.add_page_key(page_key)
    init_none_hash(get_hash_fn_by_name("sha256"))


def fake_request(ids: list[int], plan: StarPlan | None, salt: str | None = None):
    extra = {} if plan is None else {PLAN_KEY: plan.to_wire()}
    return SimpleNamespace(
        block_hashes=[],
        num_tokens=len(ids),
        all_token_ids=ids,
        mm_features=[],
        lora_request=None,
        cache_salt=salt,
        prompt_embeds=None,
        sampling_params=SimpleNamespace(extra_args=extra),
    )


def keys_of(*args, **kwargs) -> list[bytes]:
    """vLLM's own hasher, page by page."""
    return get_request_block_hasher(PAGE, get_hash_fn_by_name("sha256"))(fake_request(*args, **kwargs))


def test_block_zero_is_shared_with_dense_and_the_rest_is_not():
    ids = list(range(40))
    dense, star = keys_of(ids, None), keys_of(ids, StarPlan(8, 8, 0, 30, 36))
    assert [left == right for left, right in zip(dense, star, strict=True)] == [True] * 2 + [False] * 8


def test_a_next_turn_shares_every_complete_context_page():
    ids = list(range(60))
    first, second = keys_of(ids[:36], StarPlan(8, 8, 0, 30, 36)), keys_of(ids, StarPlan(8, 8, 0, 50, 56))
    same = [left == right for left, right in zip(first, second, strict=False)]
    assert same == [True] * 7 + [False] * 2  # pages to token 28; the page that holds 30 is the query's


def test_salts_and_other_plans_stay_apart():
    ids = list(range(40))
    plan = StarPlan(8, 8, 0, 30, 36)
    assert not set(keys_of(ids, plan)) & set(keys_of(ids, plan, salt="tenant"))
    for other in (StarPlan(8, 4, 0, 30, 36), StarPlan(8, 8, 4, 30, 36), StarPlan(16, 8, 0, 30, 36)):
        assert not set(keys_of(ids, plan)[2:]) & set(keys_of(ids, other)[2:])


def test_kv_events_tell_star_pages_from_dense_ones():
    request = fake_request(list(range(40)), StarPlan(8, 8, 0, 30, 36))
    keys = [kv_cache_utils.generate_block_hash_extra_keys(request, start, start + PAGE, 0)[0] for start in (4, 8, 28)]
    assert kv_cache_utils.to_event_extra_keys(keys) == [None, ("star:8:8:0",), ("star:8:8:0:30",)]


def influence(mask: torch.Tensor) -> torch.Tensor:
    """(tokens, tokens) bool: whose token can reach whose KV through any number of layers."""
    reach = mask.clone()
    while True:
        further = (reach.float() @ reach.float()) > 0
        if torch.equal(further, reach):
            return reach
        reach = further


def test_random_pages_with_equal_keys_have_equal_masks():
    """Two plans on the same ids: where a page's keys agree, so do the mask rows that its KV follows from."""
    draw = random.Random(0)
    equal = 0
    for _ in range(300):
        num_tokens = draw.randrange(8, 60)
        plans = [
            StarPlan(
                size := PAGE * draw.randrange(1, 4),
                PAGE * draw.randrange(size // PAGE + 1),
                PAGE * draw.randrange(size // PAGE + 1),
                draw.randrange(num_tokens),
                num_tokens,
            )
            for _ in range(2)
        ]
        masks = [
            star_mask(
                num_tokens,
                block_size=p.block_size,
                anchor_size=p.anchor_size,
                overlap_size=p.overlap_size,
                context_end=p.context_end,
            )
            for p in plans
        ]
        reaches = [influence(mask) for mask in masks]
        agree = True  # keys are chained: a page agrees only where all before it do
        for start in range(0, num_tokens - PAGE + 1, PAGE):
            page = slice(start, start + PAGE)
            keys = [None if plan.is_dense else star_page_key(plan, start, start + PAGE) for plan in plans]
            agree = agree and keys[0] == keys[1]
            if agree:
                equal += 1
                needed = reaches[0][page].any(0)
                assert torch.equal(needed, reaches[1][page].any(0))
                assert torch.equal(masks[0][needed], masks[1][needed])
    assert equal > 300
