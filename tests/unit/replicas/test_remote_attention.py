"""Remote attention: which keys other replicas hold, messages between workers, queries, responses and merges."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.attention_backends.kernels.contract import Rotation, rotate_back
from starling.attention_backends.kernels.merge import merge
from starling.attention_backends.kernels.reference import masked_attention
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.remote_queries import make_remote_queries
from starling.attention_backends.star.rows import split_rows
from starling.features.replicas import remote_attention_client, remote_attention_server
from starling.features.replicas.connector_metadata import WorkerReport
from starling.features.replicas.notifications import FRAME_BYTES, FrameAssembler, MessageLimits, frames
from starling.features.replicas.remote_attention_client import RemoteAttentionClient
from starling.features.replicas.remote_attention_server import RemoteAttentionServer
from starling.lab.selftest.masks import star_mask
from starling.scheduler.planning.documents import lay_out
from starling.scheduler.planning.plan import StarPlan, block_range
from starling.scheduler.planning.request_metadata import Shard
from tests.unit.attention_backends.test_rows import HEADS, KV_HEADS, PAGE_SIZE, SIZE, batch_metadata

REPLICAS = 3
LIMITS = MessageLimits(2**20, num_senders=4)


@st.composite
def prompts(draw):
    """(plan, first and last token of the step, shards of the prompt): a query chunk, a decode step, or the tail."""
    block = PAGE_SIZE * draw(st.integers(1, 4))
    anchor = PAGE_SIZE * draw(st.integers(0, block // PAGE_SIZE))
    context = draw(st.integers(block + PAGE_SIZE, 5 * block))
    length = context + draw(st.integers(1, 12))
    plan = StarPlan(block, anchor, 0, context, length, REPLICAS)
    blocks = len(plan.starts)
    own = draw(st.integers(1, blocks - 1)) if blocks > 1 else 1
    cuts = sorted({own, blocks, *draw(st.lists(st.integers(own, blocks), max_size=REPLICAS - 1))})
    shards = []
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        start, stop = first * block, min(last * block, context) // PAGE_SIZE * PAGE_SIZE
        if start < stop:
            shards.append(Shard(f"{number}", start, stop - start, [{"name": f"replica{number}"}]))
    end = length + draw(st.integers(0, 5))
    begin = shards[-1].start + shards[-1].num_tokens if shards else context
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
    """Against the explicit mask. The pages of other replicas hold NaN here, so that a read of one shows."""
    torch.manual_seed(seed)
    columns = max(end for _, _, end, _ in batch) // PAGE_SIZE + 1
    names = [f"r{row}" for row in range(len(batch))]
    query_lens, ends = [end - start for _, start, end, _ in batch], [end for _, _, end, _ in batch]
    common = batch_metadata(query_lens, ends, columns)
    where = {name: shards for name, (*_, shards) in zip(names, batch, strict=True) if shards}
    spans = [(s[0].start, s[-1].start + s[-1].num_tokens) if s else None for *_, s in batch]
    rows = split_rows([plan for plan, *_ in batch], query_lens, ends, PAGE_SIZE, spans)
    if rows is None:
        assert not where
        return
    query = torch.randn(sum(query_lens), HEADS, SIZE, dtype=torch.float64)
    key_pages, value_pages = torch.randn(2, len(batch) * columns, PAGE_SIZE, KV_HEADS, SIZE, dtype=torch.float64)
    here = key_pages.clone()
    for row, span in enumerate(spans):
        if span:
            here[row * columns + span[0] // PAGE_SIZE : row * columns + span[1] // PAGE_SIZE] = torch.nan
    virtual = virtual_metadata(common, rows)
    outs, lses = [], []
    for row in range(virtual.num_reqs):
        first, last = virtual.query_start_loc[row : row + 2].tolist()
        length = int(virtual.seq_lens[row])
        pages = virtual.block_table_tensor[row, : -(-length // PAGE_SIZE)].long()
        mask = torch.arange(length)[None] <= (length - (last - first) + torch.arange(last - first))[:, None]
        key, value = here[pages].flatten(0, 1)[:length], value_pages[pages].flatten(0, 1)[:length]
        out, lse = attend(query[first:last], key, value, mask)
        outs.append(out), lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses)
    queries = make_remote_queries(rows, names, where, PAGE_SIZE)
    assert len({remote.addresses[0]["name"] for remote in queries}) == len(queries)
    for remote in queries:
        assert len(set(remote.tokens.tolist())) == len(remote.tokens) == sum(span.num_queries for span in remote.spans)
        for span in remote.spans:
            shard = next(shard for shard in where[span.request_id] if shard.name == span.shard)
            assert not span.rotate_by.any() and not (span.num_keys % PAGE_SIZE).any()
            pages = np.concatenate(
                [
                    np.arange(page, page + keys // PAGE_SIZE)
                    for page, keys in zip(span.first_pages, span.num_keys, strict=True)
                ]
            )
            assert pages.min() >= 0 and (pages.max() + 1) * PAGE_SIZE <= shard.num_tokens
            pages += int(span.request_id[1:]) * columns + shard.start // PAGE_SIZE
            tokens = torch.from_numpy(remote.tokens[span.first_query : span.first_query + span.num_queries])
            key, value = key_pages[pages].flatten(0, 1), value_pages[pages].flatten(0, 1)
            every = torch.ones(span.num_queries, len(key), dtype=torch.bool)
            theirs = attend(query[tokens], key, value, every)
            merged = merge(torch.stack((out[tokens], theirs[0])), torch.stack((lse[tokens], theirs[1])))
            out[tokens], lse[tokens] = merged
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


def test_a_decode_step_is_rewritten_only_where_other_replicas_hold_keys():
    plan = StarPlan(8, 8, 0, 30, 40, 2)
    rows = split_rows([plan, plan, None], [1, 1, 1], [45, 45, 9], PAGE_SIZE, [(16, 28), None, None])
    assert rows.seq_lens.tolist() == [45 - 12, 45, 9]
    (remote,) = rows.remote
    assert (remote.row, remote.starts.tolist(), remote.lengths.tolist(), remote.rotate_by.tolist()) == (
        0,
        [16],
        [12],
        [0],
    )
    assert rows.gathered.tolist() == [0] and rows.page_columns[0].tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert split_rows([plan], [1], [45], PAGE_SIZE, [None]) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3 * FRAME_BYTES), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_messages_arrive_whole_in_whatever_order_their_frames_arrive(sizes, chance):
    sent, loose = {}, []
    for number, size in enumerate(sizes):
        body = bytes(chance.randrange(256) for _ in range(min(size, 50))) * (size // 50 + 1)
        sent[number] = ({"id": number, "text": "a" * size}, body)
        loose += [(f"from{number % 2}", frame) for frame in frames(number, *sent[number])]
    chance.shuffle(loose)
    assembler = FrameAssembler(LIMITS)
    whole = [message for message in (assembler.add(*frame) for frame in loose) if message is not None]
    assert {message.header["id"]: (message.header, bytes(message.body)) for message in whole} == sent
    assert not assembler.incomplete


def test_the_incomplete_messages_of_a_sender_can_be_dropped():
    assembler = FrameAssembler(LIMITS)
    first, _ = frames(1, {}, bytes(FRAME_BYTES))
    assembler.add("gone", first)
    assembler.add("other", first)
    assembler.drop("gone")
    assert list(assembler.incomplete) == [("other", 1)]


CPU_PAGE, CPU_SIZE = 32, 32
ANGLES = torch.outer(torch.arange(400.0), 0.7 ** torch.arange(8.0))
ROTATION = Rotation(ANGLES.cos(), ANGLES.sin(), True)


def cpu_cache(pages: int) -> torch.Tensor:
    """A KV cache in the layout of vLLM's CPU backend, full of random keys and values."""
    return torch.randn(pages, KV_HEADS, CPU_PAGE, 2 * CPU_SIZE)


def keys_and_values(cache: torch.Tensor, pages: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, KV heads, size) each: keys lie as (size, page) in memory."""
    both = cache.view(len(cache), KV_HEADS, 2 * CPU_PAGE, CPU_SIZE)[pages]
    key = both[:, :, :CPU_PAGE].reshape(len(pages), KV_HEADS, CPU_SIZE, CPU_PAGE)
    return key.permute(0, 3, 1, 2).flatten(0, 1), both[:, :, CPU_PAGE:].transpose(1, 2).flatten(0, 1)


@pytest.fixture(scope="module")
def servers():
    pytest.importorskip("nixl")
    torch.manual_seed(1)
    caches = [cpu_cache(8) for _ in range(2)]
    made = [
        RemoteAttentionServer(
            f"test-server-{number}",
            {"layer": cache, "bf16 layer": cache.to(torch.bfloat16)},
            lambda: {"layer": ROTATION},
            LIMITS,
        )
        for number, cache in enumerate(caches)
    ]
    yield made
    for server in made:
        server.stop()


@pytest.fixture(scope="module")
def client(servers):
    counted = []
    made = RemoteAttentionClient("test-client", 0, counted.append, LIMITS)
    made.counted = counted
    return made


PLAN = StarPlan(64, 64, 0, 4 * 64, 4 * 64 + 8, 3)
TABLES = {"a": [5, 2], "b": [1, 7]}


def remote_queries(servers, request_id: str = "me"):
    """Queries for blocks 1 and 2 of PLAN's prompt, at one server each; blocks 0 and 3, and the query, are local."""
    shards = [
        Shard(name, 64 * (1 + index), 64, [servers[index].open(name, TABLES[name])]) for index, name in enumerate("ab")
    ]
    rows = split_rows([PLAN], [8], [PLAN.num_prompt_tokens], CPU_PAGE, [(64, 192)])
    return make_remote_queries(rows, [request_id], {request_id: shards}, CPU_PAGE)


def test_responses_are_attention_over_the_pages_of_the_servers(servers, client):
    torch.manual_seed(2)
    query = torch.randn(8, HEADS, CPU_SIZE)
    ours, our_lse = torch.randn(8, HEADS, CPU_SIZE), torch.randn(8, HEADS)
    out, lse = ours.clone(), our_lse.clone()
    step = client.step(remote_queries(servers))
    client.counted.clear()
    for _ in range(2):  # as two layers do
        out, lse = ours.clone(), our_lse.clone()
        step.finish(step.begin("layer", query, 0.3, 0.0), out, lse)
    parts = [(ours, our_lse)]
    for server, name in zip(servers, "ab", strict=True):
        key, value = keys_and_values(server.kv_caches["layer"], TABLES[name])
        parts.append(masked_attention(query, key, value, torch.ones(8, len(key), dtype=torch.bool), 0.3))
    want = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-5)
    assert client.take_lost() is None
    assert sum(client.counted) == 2 * 2 * 8 * HEADS * (2 * CPU_SIZE + 1) * 4  # layers, servers, queries and responses


def test_blocks_with_positions_of_their_own_are_met_by_turned_queries_where_they_are(servers, client):
    """The head, block 1 and the query are here, blocks 2 and 3 at one server, blocks 4 and 5 at the other."""
    lengths = [40, 20, 33, 31, 5, 64]
    ends = np.cumsum([0, *lengths]).tolist()
    blocks, end = lay_out(list(itertools.pairwise(ends)), CPU_PAGE)
    plan = StarPlan(64, 32, 0, end, end + 8, 3, True, documents=blocks)
    held = [(2, 4), (4, 6)]
    tables = [[4, 0, 6], [2, 5, 1]]
    shards = []
    for server, (first, stop), table, name in zip(servers, held, tables, "cd", strict=True):
        start, last = block_range(plan, first, stop)
        shards.append(Shard(name, start, last - start, [server.open(name, table)]))
    span = (shards[0].start, end)
    rows = split_rows([plan], [8], [end + 8], CPU_PAGE, [span])
    queries = make_remote_queries(rows, ["me"], {"me": shards}, CPU_PAGE)
    assert [remote.tokens.tolist() for remote in queries] == [list(range(8))] * 2  # each token is sent once
    assert rows.rerotated.first_page.tolist() == [0, 2]  # of the head and of block 1

    torch.manual_seed(4)
    query = torch.randn(8, HEADS, CPU_SIZE)
    ours, our_lse = torch.randn(8, HEADS, CPU_SIZE), torch.randn(8, HEADS)
    parts = [(ours, our_lse)]
    for server, (first, stop), table in zip(servers, held, tables, strict=True):
        key, value = keys_and_values(server.kv_caches["layer"], table)
        begin = blocks[first][0]
        for number in range(first, stop):
            start, last = blocks[number]
            rotate_by = int(plan.document_keys.rotate_by[number])
            assert rotate_by == ends[number] - 32
            rerotated = rotate_back(query, ANGLES.cos()[[rotate_by] * 8], ANGLES.sin()[[rotate_by] * 8], True)
            every, own = torch.ones(8, last - start, dtype=torch.bool), slice(start - begin, last - begin)
            parts.append(masked_attention(rerotated, key[own], value[own], every, 0.3))
    want = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    out, lse = ours.clone(), our_lse.clone()
    step = client.step(queries)
    step.finish(step.begin("layer", query, 0.3, 0.0), out, lse)
    assert client.take_lost() is None
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-5)
    for server in servers:
        server.close("cd")


def test_bfloat16_is_rounded_once_after_the_last_merge(servers, client):
    torch.manual_seed(3)
    query = torch.randn(8, HEADS, CPU_SIZE).to(torch.bfloat16)
    out, lse = torch.randn(8, HEADS, CPU_SIZE).to(torch.bfloat16), torch.randn(8, HEADS)
    parts = [(out.float(), lse.clone())]
    for server, name in zip(servers, "ab", strict=True):
        key, value = keys_and_values(server.kv_caches["bf16 layer"].float(), TABLES[name])
        part = masked_attention(query.float(), key, value, torch.ones(8, len(key), dtype=torch.bool), 0.3)
        parts.append((part[0].to(torch.bfloat16).float(), part[1]))  # as it travels
    wanted = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    step = client.step(remote_queries(servers))
    step.finish(step.begin("bf16 layer", query, 0.3, 0.0), out, lse)
    torch.testing.assert_close(out.float(), wanted[0], rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-2, atol=1e-2)


def test_each_tensor_parallel_rank_queries_the_same_rank(servers):
    client = RemoteAttentionClient("test-client-rank-1", 1, lambda size: None, LIMITS)
    (first,) = (remote for remote in remote_queries(servers) if remote.spans[0].shard == "a")
    ranks = replace(first, addresses=[{"name": "rank 0 of it"}, *first.addresses])
    out = torch.zeros(8, HEADS, CPU_SIZE)
    step = client.step([ranks])
    step.finish(step.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.full((8, HEADS), -torch.inf))
    assert out.abs().sum() > 0 and client.take_lost() is None


def test_a_query_of_a_closed_shard_is_an_error_at_once_and_reads_nothing(servers, client):
    step = client.step(remote_queries(servers))
    servers[1].close(["b"])
    out = torch.zeros(8, HEADS, CPU_SIZE)
    step.finish(step.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert out.abs().sum() > 0  # the response of the other server
    lost = client.take_lost()
    assert "b is not open" in lost.reasons["me"]
    assert step.begin("layer", torch.randn_like(out), 0.3, 0.0).keys() and len(step.queries) == 1
    assert lost.aggregate(WorkerReport({"other": "why"})).reasons == lost.reasons | {"other": "why"}


def test_requests_of_a_server_that_does_not_respond_are_lost_once_a_step(servers, client, monkeypatch):
    step = client.step(remote_queries(servers, "slow"))
    out = torch.zeros(8, HEADS, CPU_SIZE)
    with servers[1].lock, monkeypatch.context() as patch:  # it can read no page
        for _ in range(2):
            sent, arrived = step.begin("layer", torch.randn_like(out), 0.3, 0.0), []
            while not any(message.header.get("id") in sent for message in arrived):  # the other server's response
                arrived += client.messenger.receive()
            batches = iter([arrived])
            patch.setattr(client.messenger, "receive", lambda batches=batches: next(batches, []))
            patch.setattr(remote_attention_client, "RESPONSE_SECONDS", 0.2)
            step.finish(sent, out, torch.zeros(8, HEADS))
            patch.undo()
    assert "no answer" in client.take_lost().reasons["slow"]
    assert len(step.queries) == 1
    again = client.step(remote_queries(servers, "next"))  # the late response belongs to no query of this step
    again.finish(again.begin("layer", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert client.take_lost() is None


def test_an_unknown_layer_is_an_error_in_the_response(servers, client):
    step = client.step(remote_queries(servers))
    out = torch.zeros(8, HEADS, CPU_SIZE)
    step.finish(step.begin("other", torch.randn_like(out), 0.3, 0.0), out, torch.zeros(8, HEADS))
    assert "other" in client.take_lost().reasons["me"]
    assert step.queries == []


def test_the_thread_sleeps_once_no_shard_is_open_for_a_while(servers, monkeypatch):
    monkeypatch.setattr(remote_attention_server, "LINGER_SECONDS", float("inf"))
    servers[0].open("a", TABLES["a"])  # the thread may have gone to sleep before this test
    servers[0].close(list(servers[0].shards))
    assert servers[0].has_work.is_set()
    monkeypatch.setattr(remote_attention_server, "LINGER_SECONDS", 0.0)
    deadline = time.monotonic() + 300
    while servers[0].has_work.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not servers[0].has_work.is_set()
    address = servers[0].open("a", TABLES["a"])
    assert servers[0].has_work.is_set() and address["name"] == "test-server-0"
    assert np.array_equal(servers[0].shards["a"], TABLES["a"])
