"""Attention over shards: which keys are elsewhere, messages between workers, and what is asked and merged."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_backends.kernels.merge import merge
from attention_backends.star.metadata import virtual_metadata
from attention_backends.star.reference import masked_attention, star_mask
from attention_backends.star.rows import split_rows
from attention_backends.star.shards import make_asks
from engine_ext import shard_client, shard_holder
from engine_ext.shard_client import LostRequests, ShardClient
from engine_ext.shard_holder import ShardHolder
from scheduler.messenger import FRAME_BYTES, Joiner, frames
from scheduler.plan import StarPlan
from scheduler.share import Shard
from tests.unit.test_rows import HEADS, KV_HEADS, PAGE, SIZE, batch_metadata

HOLDERS = 3


@st.composite
def prompts(draw):
    """(plan, first and last token of the step, shards of the prompt): a query chunk, a decode step, or the tail."""
    block = PAGE * draw(st.integers(1, 4))
    anchor = PAGE * draw(st.integers(0, block // PAGE))
    context = draw(st.integers(block + PAGE, 5 * block))
    length = context + draw(st.integers(1, 12))
    plan = StarPlan(block, anchor, 0, context, length, HOLDERS)
    blocks = plan.num_star_blocks
    own = draw(st.integers(1, blocks - 1)) if blocks > 1 else 1
    cuts = sorted({own, blocks, *draw(st.lists(st.integers(own, blocks), max_size=HOLDERS - 1))})
    shards = []
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        start, stop = first * block, min(last * block, context) // PAGE * PAGE
        if start < stop:
            shards.append(Shard(f"{number}", start, stop - start, [{"name": f"holder{number}"}]))
    end = length + draw(st.integers(0, 5))
    begin = shards[-1].start + shards[-1].tokens if shards else context
    start = draw(st.integers(begin, end - 1)) if shards else draw(st.integers(0, end - 1))
    return plan, start, end, shards


def attend(query, key, value, mask):
    """As masked_attention; out 0 and lse -inf where a query sees nothing."""
    if not key.shape[0]:
        return torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf, dtype=query.dtype)
    return masked_attention(query, key, value, mask, SIZE**-0.5)


@settings(max_examples=150, deadline=None)
@given(st.lists(prompts(), min_size=1, max_size=3), st.integers(0, 2**31))
def test_local_and_remote_keys_merged_are_star_attention(batch, seed):
    """Against the explicit mask; the pages that are elsewhere hold NaN here, so that reading one shows."""
    torch.manual_seed(seed)
    columns = max(end for _, _, end, _ in batch) // PAGE + 1
    names = [f"r{row}" for row in range(len(batch))]
    query_lens, ends = [end - start for _, start, end, _ in batch], [end for _, _, end, _ in batch]
    common = batch_metadata(query_lens, ends, columns)
    where = {name: shards for name, (*_, shards) in zip(names, batch, strict=True) if shards}
    spans = [(s[0].start, s[-1].start + s[-1].tokens) if s else None for *_, s in batch]
    rows = split_rows([plan for plan, *_ in batch], query_lens, ends, PAGE, spans)
    if rows is None:
        assert not where
        return
    query = torch.randn(sum(query_lens), HEADS, SIZE, dtype=torch.float64)
    key_pages, value_pages = torch.randn(2, len(batch) * columns, PAGE, KV_HEADS, SIZE, dtype=torch.float64)
    here = key_pages.clone()
    for row, span in enumerate(spans):
        if span:
            here[row * columns + span[0] // PAGE : row * columns + span[1] // PAGE] = torch.nan
    virtual = virtual_metadata(common, rows)
    outs, lses = [], []
    for row in range(virtual.num_reqs):
        first, last = virtual.query_start_loc[row : row + 2].tolist()
        length = int(virtual.seq_lens[row])
        pages = virtual.block_table_tensor[row, : -(-length // PAGE)].long()
        mask = torch.arange(length)[None] <= (length - (last - first) + torch.arange(last - first))[:, None]
        key, value = here[pages].flatten(0, 1)[:length], value_pages[pages].flatten(0, 1)[:length]
        out, lse = attend(query[first:last], key, value, mask)
        outs.append(out), lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses)
    asks = make_asks(rows, names, where, PAGE)
    assert len({ask.addresses[0]["name"] for ask in asks}) == len(asks)
    for ask in asks:
        assert len(set(ask.tokens.tolist())) == len(ask.tokens) == sum(span.queries for span in ask.spans)
        first = 0
        for span in ask.spans:
            shard = next(shard for shard in where[span.request_id] if shard.name == span.shard)
            assert span.first >= 0 and (span.first + span.pages) * PAGE <= shard.tokens
            begin = int(span.request_id[1:]) * columns + shard.start // PAGE + span.first
            tokens = torch.from_numpy(ask.tokens[first : first + span.queries])
            key, value = (
                pages[begin : begin + span.pages].flatten(0, 1) for pages in (key_pages, value_pages)
            )  # fmt: skip
            every = torch.ones(span.queries, len(key), dtype=torch.bool)
            theirs = attend(query[tokens], key, value, every)
            merged = merge(torch.stack((out[tokens], theirs[0])), torch.stack((lse[tokens], theirs[1])))
            out[tokens], lse[tokens] = merged
            first += span.queries
    for row, (plan, start, end, _) in enumerate(batch):
        mask = star_mask(
            end,
            block_size=plan.block_size,
            anchor_size=plan.anchor_size,
            overlap_size=0,
            context_end=plan.context_end,
        )[start:]
        pages = common.block_table_tensor[row].long()
        key, value = key_pages[pages].flatten(0, 1)[:end], value_pages[pages].flatten(0, 1)[:end]
        first, last = common.query_start_loc[row : row + 2].tolist()
        want = masked_attention(query[first:last], key, value, mask, SIZE**-0.5)[0]
        torch.testing.assert_close(out[first:last], want, rtol=1e-9, atol=1e-9)


def test_a_decode_step_is_rewritten_where_keys_are_elsewhere_and_only_there():
    plan = StarPlan(8, 8, 0, 30, 40, 2)
    rows = split_rows([plan, plan, None], [1, 1, 1], [45, 45, 9], PAGE, [(16, 28), None, None])
    assert rows.seq_lens.tolist() == [45 - 12, 45, 9]
    assert [(remote.row, remote.keys) for remote in rows.remote] == [(0, ((16, 28),))]
    assert rows.gathered.tolist() == [0] and rows.pages[0].tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert split_rows([plan], [1], [45], PAGE, [None]) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3 * FRAME_BYTES), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_messages_come_through_whole_in_whatever_order_their_frames_come(sizes, chance):
    sent, loose = {}, []
    for number, size in enumerate(sizes):
        body = bytes(chance.randrange(256) for _ in range(min(size, 50))) * (size // 50 + 1)
        sent[number] = ({"id": number, "text": "a" * size}, body)
        loose += [(f"from{number % 2}", frame) for frame in frames(number, *sent[number])]
    chance.shuffle(loose)
    joiner = Joiner()
    whole = [message for message in (joiner.add(*frame) for frame in loose) if message is not None]
    assert {message.header["id"]: (message.header, bytes(message.body)) for message in whole} == sent
    assert not joiner.open


def test_what_a_sender_began_can_be_forgotten():
    joiner = Joiner()
    first, _ = frames(1, {}, bytes(FRAME_BYTES))
    joiner.add("gone", first)
    joiner.add("other", first)
    joiner.forget("gone")
    assert list(joiner.open) == [("other", 1)]


CPU_PAGE, CPU_SIZE = 32, 32


def cpu_cache(pages: int) -> torch.Tensor:
    """A KV cache as vLLM's CPU backend lays it out, full of what could be keys and values."""
    return torch.randn(pages, KV_HEADS, CPU_PAGE, 2 * CPU_SIZE)


def keys_and_values(cache: torch.Tensor, pages: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, KV heads, size) each: keys lie as (size, page) in memory."""
    both = cache.view(len(cache), KV_HEADS, 2 * CPU_PAGE, CPU_SIZE)[pages]
    key = both[:, :, :CPU_PAGE].reshape(len(pages), KV_HEADS, CPU_SIZE, CPU_PAGE)
    return key.permute(0, 3, 1, 2).flatten(0, 1), both[:, :, CPU_PAGE:].transpose(1, 2).flatten(0, 1)


@pytest.fixture(scope="module")
def holders():
    pytest.importorskip("nixl")
    torch.manual_seed(1)
    caches = [cpu_cache(8) for _ in range(2)]
    made = [
        ShardHolder(f"test-holder-{number}", {"layer": cache, "bf16 layer": cache.to(torch.bfloat16)})
        for number, cache in enumerate(caches)
    ]
    yield made
    for holder in made:
        holder.stop()


@pytest.fixture(scope="module")
def client(holders):
    moved = []
    made = ShardClient("test-client", 0, CPU_PAGE, moved.append)
    made.moved = moved
    return made


PLAN = StarPlan(64, 64, 0, 4 * 64, 4 * 64 + 8, 3)
TABLES = {"a": [5, 2], "b": [1, 7]}


def asks_over(holders, request_id: str = "me"):
    """Blocks 1 and 2 of PLAN's prompt at one holder each; blocks 0 and 3, and the query, are here."""
    shards = [
        Shard(name, 64 * (1 + index), 64, [holders[index].open(name, TABLES[name])]) for index, name in enumerate("ab")
    ]
    rows = split_rows([PLAN], [8], [PLAN.num_prompt_tokens], CPU_PAGE, [(64, 192)])
    return make_asks(rows, [request_id], {request_id: shards}, CPU_PAGE)


def test_what_holders_answer_is_attention_over_their_pages(holders, client):
    torch.manual_seed(2)
    query = torch.randn(8, HEADS, CPU_SIZE)
    ours, our_lse = torch.randn(8, HEADS, CPU_SIZE), torch.randn(8, HEADS)
    out, lse = ours.clone(), our_lse.clone()
    step = client.step(asks_over(holders))
    client.moved.clear()
    for _ in range(2):  # as two layers do
        out, lse = ours.clone(), our_lse.clone()
        step.finish(step.begin("layer", query, 0.3, 0.0), out, lse)
    parts = [(ours, our_lse)]
    for holder, name in zip(holders, "ab", strict=True):
        key, value = keys_and_values(holder.caches["layer"], TABLES[name])
        parts.append(masked_attention(query, key, value, torch.ones(8, len(key), dtype=torch.bool), 0.3))
    want = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-5)
    assert client.take_lost() is None
    assert sum(client.moved) == 2 * 2 * 8 * HEADS * (2 * CPU_SIZE + 1) * 4  # layers, holders, queries and answers


def test_bfloat16_is_rounded_once_after_the_last_merge(holders, client):
    torch.manual_seed(3)
    query = torch.randn(8, HEADS, CPU_SIZE).to(torch.bfloat16)
    out, lse = torch.randn(8, HEADS, CPU_SIZE).to(torch.bfloat16), torch.randn(8, HEADS)
    parts = [(out.float(), lse.clone())]
    for holder, name in zip(holders, "ab", strict=True):
        key, value = keys_and_values(holder.caches["bf16 layer"].float(), TABLES[name])
        part = masked_attention(query.float(), key, value, torch.ones(8, len(key), dtype=torch.bool), 0.3)
        parts.append((part[0].to(torch.bfloat16).float(), part[1]))  # as it travels
    wanted = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    step = client.step(asks_over(holders))
    step.finish(step.begin("bf16 layer", query, 0.3, 0.0), out, lse)
    torch.testing.assert_close(out.float(), wanted[0], rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-2, atol=1e-2)


def test_each_tensor_parallel_rank_asks_the_same_rank(holders):
    client = ShardClient("test-client-rank-1", 1, CPU_PAGE, lambda size: None)
    (first,) = (ask for ask in asks_over(holders) if ask.spans[0].shard == "a")
    ranks = replace(first, addresses=[{"name": "rank 0 of it"}, *first.addresses])
    out = torch.zeros(8, HEADS, CPU_SIZE)
    step = client.step([ranks])
    step.finish(step.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.full((8, HEADS), -torch.inf))
    assert out.abs().sum() > 0 and client.take_lost() is None


def test_a_shard_that_was_closed_is_an_error_told_at_once_and_not_read(holders, client):
    step = client.step(asks_over(holders))
    holders[1].close(["b"])
    out = torch.zeros(8, HEADS, CPU_SIZE)
    step.finish(step.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert out.abs().sum() > 0  # of the other holder
    lost = client.take_lost()
    assert "b is not open" in lost.reasons["me"]
    assert step.begin("layer", torch.randn_like(out), 0.3, 0.0).keys() and len(step.asks) == 1
    assert lost.aggregate(LostRequests({"other": "why"})).reasons == lost.reasons | {"other": "why"}


def test_a_holder_that_does_not_answer_costs_its_requests_once_a_step(holders, client, monkeypatch):
    monkeypatch.setattr(shard_client, "ANSWER_SECONDS", 0.2)
    step = client.step(asks_over(holders, "slow"))
    out = torch.zeros(8, HEADS, CPU_SIZE)
    with holders[1].lock:  # it gets no further
        for _ in range(2):
            step.finish(step.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert "no answer" in client.take_lost().reasons["slow"]
    assert len(step.asks) == 1
    again = client.step(asks_over(holders, "next"))  # and its late answer is nobody's
    monkeypatch.setattr(shard_client, "ANSWER_SECONDS", 10.0)
    again.finish(again.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert client.take_lost() is None


def test_a_layer_that_is_not_there_and_another_shape_are_errors_told(holders, client):
    step = client.step(asks_over(holders))
    out = torch.zeros(8, HEADS, CPU_SIZE)
    step.finish(step.begin("other", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert "other" in client.take_lost().reasons["me"]
    assert step.asks == []


def test_a_thread_with_nothing_open_sleeps_after_a_while(holders, monkeypatch):
    holders[0].close(list(holders[0].shards))
    assert holders[0].work.is_set()
    monkeypatch.setattr(shard_holder, "LINGER_SECONDS", 0.0)
    deadline = time.monotonic() + 10
    while holders[0].work.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not holders[0].work.is_set()
    address = holders[0].open("a", TABLES["a"])
    assert holders[0].work.is_set() and address["name"] == "test-holder-0"
    assert np.array_equal(holders[0].shards["a"], TABLES["a"])
