"""Keys of pages in prompts with documents: equal exactly if the KV of the pages is.

The KV of a token is modelled as a hash of all that attention brings to it, layer by layer: tokens, the positions at
which keys were computed, and the distances at which they are seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import init_none_hash

from starling.scheduler.cache_keys import independent_block_hasher, page_keys
from starling.scheduler.planning.plan import StarPlan, pad
from starling.vllm_compat import prefix_cache
from starling.vllm_compat.prefix_cache import add_page_keys, plain_request_hasher
from tests.unit.masks import mask_of
from tests.unit.scheduler.planning.test_block_positions import PAD, PAGE_SIZE, QUERY, Layout
from tests.unit.scheduler.test_cache_keys import fake_request

HASH = get_hash_fn_by_name("sha256")
LAYERS = 3  # behind the second one a query's KV depends on the anchor through blocks
SALTS, ADAPTERS = (None, "tenant"), (None, SimpleNamespace(lora_name="adapter", lora_path="/adapter"))


@pytest.fixture(scope="module", autouse=True)
def hashing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "_page_keys", [])
        add_page_keys(page_keys)
        init_none_hash(HASH)
        yield


@dataclass(frozen=True)
class Prompt:
    """A prompt and its output, under a plan.

    Attributes:
        ids: the client's.
        layout: of documents; None: ``plan`` is the plan.
        tenant: numbers of its salt and its adapter.
    """

    ids: tuple[int, ...]
    layout: Layout | None = None
    plan: StarPlan | None = None
    tenant: tuple[int, int] = (0, 0)

    def request(self):
        plan = self.layout.plan if self.layout else self.plan
        ids = pad(self.layout.plan, [*self.ids]) if self.layout else [*self.ids]
        request = fake_request(ids, plan, SALTS[self.tenant[0]])
        request.lora_request = ADAPTERS[self.tenant[1]]
        return request

    def kinds(self) -> list[object]:
        """For each page what, beside its KV, must be the same for pages of two prompts to have one key.

        A block can have the KV of another prompt's start, where it has no anchor, or where it is the first one behind a
        head that is all anchor. Such a page is computed once for each.
        """
        if self.layout is None:
            return [None] * (len(self.ids) // PAGE_SIZE)
        blocks = [slot.block for slot in self.layout.slots[PAGE_SIZE - 1 :: PAGE_SIZE]]
        anchor, lengths = self.layout.anchor_size, tuple(self.layout.lengths)
        return [lengths if block == QUERY else ("block", anchor) if block or not anchor else "head" for block in blocks]

    def kv(self) -> list[tuple[int, ...]]:
        """The KV of each whole page: of its tokens in the last layer, which stands for all layers before."""
        if self.layout is None:
            count = len(self.ids)
            mask = mask_of(self.plan or StarPlan(PAGE_SIZE, 0, 0, 0, count), count).tolist()
            own = true = list(range(count))
            is_query = [False] * count
            states = [hash((token, self.tenant)) for token in self.ids]
        else:
            slots, anchor = self.layout.slots, self.layout.anchor_size
            count = len(slots)
            mask = [[self.layout.sees(query, key) for key in range(count)] for query in range(count)]
            true = [-1 if slot.token is None else slot.token for slot in slots]
            is_query = [slot.block == QUERY for slot in slots]
            own = [slot.token if slot.block == QUERY else slot.place + (anchor if slot.block else 0) for slot in slots]
            states = [hash((PAD if slot.token is None else self.ids[slot.token], self.tenant)) for slot in slots]
        for _ in range(LAYERS):
            places = [true if one else own for one in is_query]
            kv = [hash(pair) for pair in zip(states, own, strict=True)]
            states = [
                hash(
                    (
                        state,
                        *sorted((kv[key], place[query] - place[key]) for key in range(query + 1) if mask[query][key]),
                    )
                )
                for query, (state, place) in enumerate(zip(states, places, strict=True))
            ]
        kv = [hash(pair) for pair in zip(states, own, strict=True)]
        return [tuple(kv[first : first + PAGE_SIZE]) for first in range(0, count - PAGE_SIZE + 1, PAGE_SIZE)]


tokens = st.sampled_from([PAD, PAD - 1])
texts = st.lists(tokens, min_size=1, max_size=9)


@st.composite
def batches(draw):
    """Prompts of few documents, heads and questions, so that they have pages in common."""
    documents = draw(st.lists(texts, min_size=1, max_size=3))
    documents += [[*text, *[PAD] * draw(st.integers(1, 2))] for text in documents[:2]]
    heads = [[], draw(st.lists(tokens, max_size=11))]
    questions = draw(st.lists(texts, min_size=1, max_size=2))
    prompts = []
    for _ in range(draw(st.integers(2, 6))):
        head, question = draw(st.sampled_from(heads)), draw(st.sampled_from(questions))
        chosen = draw(st.lists(st.sampled_from(documents), min_size=1 if head else 2, max_size=4))
        tenant = draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1)]))
        anchor = PAGE_SIZE * draw(st.integers(0, len(head) // PAGE_SIZE))
        layout = Layout([len(head), *map(len, chosen)], anchor, len(question))
        prompt = Prompt((*head, *chain(*chosen), *question), layout, tenant=tenant)
        prompts.append(prompt)
        if len(chosen) > 2 and draw(st.booleans()):  # the same tokens, cut at other places
            first = draw(st.integers(1, len(chosen) - 1))
            lengths = [*layout.lengths]
            lengths[first : first + 2] = [sum(lengths[first : first + 2])]
            prompts.append(replace(prompt, layout=replace(layout, lengths=lengths)))
        if draw(st.booleans()):  # one token is another
            ids, place = [*prompt.ids], draw(st.integers(0, len(prompt.ids) - 1))
            ids[place] = 2 * PAD - 1 - ids[place]
            prompts.append(replace(prompt, ids=tuple(ids)))
        if draw(st.booleans()):  # the same tokens, with or without padding, under other plans
            ids = tuple(draw(st.sampled_from([[*prompt.ids], pad(layout.plan, [*prompt.ids])])))
            size = PAGE_SIZE * draw(st.integers(1, 3))
            near, overlap = (PAGE_SIZE * draw(st.integers(0, size // PAGE_SIZE)) for _ in range(2))
            plan = StarPlan(size, near, overlap, draw(st.integers(0, len(ids) - 1)), len(ids))
            plan = draw(st.sampled_from([None, plan, replace(plan, overlap_size=0)]))
            prompts.append(Prompt(ids, None, None if plan is None or (len(plan.starts) < 2) else plan, tenant))
    return prompts


def pages(prompts: list[Prompt], make) -> list[tuple[bytes, tuple[int, ...], object]]:
    """(key, KV, kind) of each page of all prompts."""
    found = []
    for prompt in prompts:
        keys = make(PAGE_SIZE, HASH)(prompt.request())
        found += zip(keys, prompt.kv(), prompt.kinds(), strict=True)
    return found


@settings(max_examples=200)
@given(batches())
def test_equal_keys_are_those_of_equal_kv(prompts):
    for make in (independent_block_hasher, plain_request_hasher):
        known: dict[bytes, tuple[int, ...]] = {}
        for key, kv, _ in pages(prompts, make):
            assert known.setdefault(key, kv) == kv


@settings(max_examples=200)
@given(batches())
def test_equal_kv_of_blocks_has_equal_keys(prompts):
    known: dict[tuple, bytes] = {}
    for key, kv, kind in pages([prompt for prompt in prompts if prompt.layout], independent_block_hasher):
        assert known.setdefault((kv, kind), key) == key


def test_the_model_tells_apart_what_differs_and_finds_what_is_equal():
    """Swapped documents keep their KV, and the query behind them does not."""
    first, second, question = [1, 2, 3], [4, 5, 6, 7, 8], [9, 9, 9, 9]
    head = [1, 1, 1, 1, 2]
    one = Prompt((*head, *first, *second, *question), Layout([5, 3, 5], 4, 4))
    other = Prompt((*head, *second, *first, *question), Layout([5, 5, 3], 4, 4))
    left, right = one.kv(), other.kv()
    assert [*left[:2], *left[3:5], left[2]] == right[:5]
    assert left[5] != right[5]
    assert one.kinds() == ["head"] * 2 + [("block", 4)] * 3 + [(5, 3, 5)]
