"""Page keys are equal exactly if the KV of the pages is."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

from starling.scheduler.cache_keys import independent_block_hasher, page_keys, star_page_key
from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import KEY, RequestMetadata
from starling.vllm_compat.prefix_cache import add_page_keys
from tests.unit.masks import mask_of

PAGE_SIZE = 4


@pytest.fixture(scope="module", autouse=True)
def hashing():
    add_page_keys(page_keys)
    add_page_keys(page_keys)
    init_none_hash(get_hash_fn_by_name("sha256"))


def fake_request(ids: list[int], plan: StarPlan | None, salt: str | None = None):
    extra = {KEY: RequestMetadata(plan).to_wire()}
    return SimpleNamespace(
        block_hashes=[],
        num_tokens=len(ids),
        all_token_ids=ids,
        _all_token_ids=ids,
        mm_features=[],
        lora_request=None,
        cache_salt=salt,
        prompt_embeds=None,
        sampling_params=SimpleNamespace(extra_args=extra),
    )


def keys_of(*args, **kwargs) -> list[bytes]:
    """The keys of a request's pages, from vLLM's request hasher."""
    return get_request_block_hasher(PAGE_SIZE, get_hash_fn_by_name("sha256"))(fake_request(*args, **kwargs))


def test_star_and_dense_requests_have_the_same_keys_in_block_0_only():
    ids = list(range(40))
    dense, star = keys_of(ids, None), keys_of(ids, StarPlan(8, 8, 0, 30, 36))
    assert [left == right for left, right in zip(dense, star, strict=True)] == [True] * 2 + [False] * 8


def test_the_next_turn_of_a_chat_has_the_same_keys_for_all_complete_context_pages():
    ids = list(range(60))
    first, second = keys_of(ids[:36], StarPlan(8, 8, 0, 30, 36)), keys_of(ids, StarPlan(8, 8, 0, 50, 56))
    same = [left == right for left, right in zip(first, second, strict=False)]
    assert same == [True] * 7 + [False] * 2  # pages up to token 28; the page with token 30 belongs to the query


def test_other_salts_and_other_plans_have_other_keys():
    ids = list(range(40))
    plan = StarPlan(8, 8, 0, 30, 36)
    assert not set(keys_of(ids, plan)) & set(keys_of(ids, plan, salt="tenant"))
    for other in (StarPlan(8, 4, 0, 30, 36), StarPlan(8, 8, 4, 30, 36), StarPlan(16, 8, 0, 30, 36)):
        assert not set(keys_of(ids, plan)[2:]) & set(keys_of(ids, other)[2:])


def test_kv_events_have_the_extra_keys_of_star_pages():
    request = fake_request(list(range(40)), StarPlan(8, 8, 0, 30, 36))
    keys = [
        kv_cache_utils.generate_block_hash_extra_keys(request, start, start + PAGE_SIZE, 0)[0] for start in (4, 8, 28)
    ]
    assert kv_cache_utils.to_event_extra_keys(keys) == [None, ("star:8:8:0",), ("star:8:8:0:30",)]


def influence(mask: torch.Tensor) -> torch.Tensor:
    """(tokens, tokens) bool: whether the KV at the row depends on the token at the column, over many layers."""
    reach = mask.clone()
    while True:
        further = (reach.float() @ reach.float()) > 0
        if torch.equal(further, reach):
            return reach
        reach = further


def test_random_pages_with_equal_keys_have_equal_masks():
    """Under two plans for the same ids, pages with equal keys depend on equal rows of the mask."""
    draw = random.Random(0)
    equal = 0
    for _ in range(300):
        num_tokens = draw.randrange(8, 60)
        plans = [
            StarPlan(
                size := PAGE_SIZE * draw.randrange(1, 4),
                PAGE_SIZE * draw.randrange(size // PAGE_SIZE + 1),
                PAGE_SIZE * draw.randrange(size // PAGE_SIZE + 1),
                draw.randrange(num_tokens),
                num_tokens,
            )
            for _ in range(2)
        ]
        masks = [mask_of(plan, num_tokens) for plan in plans]
        reaches = [influence(mask) for mask in masks]
        agree = True  # keys are chained: a page agrees only if all pages before it agree
        for start in range(0, num_tokens - PAGE_SIZE + 1, PAGE_SIZE):
            page = slice(start, start + PAGE_SIZE)
            keys = [None if (len(plan.starts) < 2) else star_page_key(plan, start, start + PAGE_SIZE) for plan in plans]
            agree = agree and keys[0] == keys[1]
            if agree:
                equal += 1
                needed = reaches[0][page].any(0)
                assert torch.equal(needed, reaches[1][page].any(0))
                assert torch.equal(masks[0][needed], masks[1][needed])
    assert equal > 300


class UnreadKeys(list):
    """The keys of a request's pages, of which only the number may be looked at."""

    def _read(self, *args):
        raise AssertionError("the keys of a request are read though no page is complete")

    __iter__ = __getitem__ = __contains__ = __add__ = __radd__ = __reversed__ = copy = index = count = _read


@pytest.mark.parametrize("plan", [None, StarPlan(8, 8, 0, 30, 36), StarPlan(8, 8, 4, 30, 36)])
def test_a_token_that_completes_no_page_costs_no_work(plan):
    """The hasher is called for every generated token, and a long prompt has thousands of keys."""
    hasher = independent_block_hasher(PAGE_SIZE, get_hash_fn_by_name("sha256"))
    ids = list(range(36))
    keys = hasher(fake_request(ids, plan))
    for num_tokens in (36, 37, 39):
        request = fake_request(UnreadKeys(range(num_tokens)), plan)
        request.block_hashes = UnreadKeys(keys)
        assert hasher(request) == []
    request = fake_request(list(range(40)), plan)
    request.block_hashes = keys
    assert keys + hasher(request) == hasher(fake_request(list(range(40)), plan))
